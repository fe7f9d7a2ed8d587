# MDLM on the One Billion Word benchmark, sentences padded to 128
# (Sahoo et al. 2024, arXiv 2406.07524).
#
#   python data.py --dataset=lm1b --tokenizer=bert-base-uncased
#   torchrun --nproc_per_node=8 train.py config/lm1b_mdlm.py
#
# Hardware: 8 GPUs, 64 rows each.
# Published (MDLM's table 1, 1M steps, 33B tokens): test perplexity at most 27.0.

out_dir = 'out-lm1b_mdlm'
dataset = 'lm1b'  # its words are joined to their punctuation again
tokenizer = 'bert-base-uncased'
val_split = 'test'
packing = 'sentence'  # [CLS], a sentence, [SEP], padding: corrupted and attended to, no loss
block_size = 128
batch_size = 64
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 128
time_conditioning = False
dropout = 0.1
objective = 'subs'
time_sampling = 'per_process'  # each micro-batch stratified alone
loss_norm = 'micro'  # sentences of all lengths: each micro-batch counts alike

learning_rate = 3e-4
max_iters = 1_000_000
lr_schedule = 'constant'
warmup_iters = 2500
lr_offset = 0
weight_decay = 0.0
grad_clip = 1.0
ema = 0.9999

eval_interval = 10_000
eval_iters = 0  # all of val_split
ckpt_interval = 2500
keep_interval = 100_000
