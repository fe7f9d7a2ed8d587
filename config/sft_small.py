# The reversal curse on a laptop: names and descriptions (Berglund et al. 2023), learnt from scratch.

out_dir = 'out-reverse'
dataset = 'reverse'
val_split = 'train'
packing = 'pair'
block_size = 52  # the longest row, and the length of eval_reverse.py
batch_size = 32
global_batch_size = 32

n_layer = 4
n_head = 4
n_embd = 192
cond_dim = 0
mlp = 'relu'
dropout = 0.0
objective = 'mlm'

optimizer = 'muon'
learning_rate = 6e-3
epochs = 20
lr_schedule = 'cosine'
warmup_iters = 50
beta2 = 0.99
ema = 0.99

eval_interval = 500
eval_iters = 10
ckpt_interval = 500
sample_at_end = False
