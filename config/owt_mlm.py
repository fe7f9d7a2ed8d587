# xlm's owt_mlm: a masked diffusion model trained with the plain MLM loss on OpenWebText documents
# of at most 1,024 tokens.
#
#   python data.py --dataset=owt-gpt2-1024-split --tokenizer=gpt2-xlm
#   torchrun --nproc_per_node=8 train.py config/owt_mlm.py
#
# Hardware: 8 GPUs of 80 GB, 32 rows each, two micro-batches a step.
# Published (step 800,000, top_p 0.95, T = 128 256 512 1024): gen. PPL 78.34 63.27 55.82 54.25,
# entropy 4.09 4.48 4.70 4.86, MAUVE 0.39 0.68 0.76 0.86.

out_dir = 'out'
dataset = 'owt-gpt2-1024-split'
tokenizer = 'gpt2-xlm'
packing = 'pad'  # a document and its EOS; padding is corrupted and predicted like any token
loss_on_padding = True
block_size = 1024
batch_size = 32
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

learning_rate = 1e-4
max_iters = 1_000_000
lr_schedule = 'constant'
warmup_iters = 2000
lr_offset = 0
weight_decay = 0.01  # on matrices
grad_clip = 1.0
ema = 0.9999

dtype = 'bfloat16'
eval_interval = 50_000
ckpt_interval = 2500
keep_interval = 100_000
