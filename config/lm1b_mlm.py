# xlm's lm1b_mlm: a masked diffusion model trained with the plain MLM loss on the One Billion Word
# benchmark, sentences padded to 128.
#
#   python data.py --dataset=lm1b --tokenizer=bert-xlm
#   torchrun --nproc_per_node=8 train.py config/lm1b_mlm.py
#
# Hardware: 8 GPUs, 64 rows each.
# Published: no figures.

out_dir = 'out-lm1b_mlm'
dataset = 'lm1b'  # its words are joined to their punctuation again
tokenizer = 'bert-xlm'  # bert-base-uncased, [BOS] and [EOS]
val_split = 'test'
packing = 'pad'  # a sentence and its EOS; padding is corrupted and predicted like any token
loss_on_padding = True
block_size = 128
batch_size = 64
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 0  # no conditioning
mlp = 'relu'
norm_bias = True
head_bias = False
dropout = 0.1
attn_dropout = 0.1
init = 'xlm'
objective = 'mlm'
schedule_parameters = dict(eps=0.0)  # masked with probability t,
sampling_eps = 0.0  # t uniform in [0, 1),
time_sampling = 'iid'  # of each row by itself
loss_norm = 'micro'  # a mean over the masked positions of each micro-batch

learning_rate = 5e-4
max_iters = 1_000_000
lr_schedule = 'constant'
warmup_iters = 1000
lr_offset = 0
weight_decay = 0.01  # on matrices
grad_clip = 1.0
ema = 0.9999

dtype = 'bfloat16'
eval_interval = 50_000
ckpt_interval = 2500
keep_interval = 100_000
