# Where data is scarce: an autoregressive net on the same 2 MB of text again and again. It soon
# knows them by heart. Beside it stands scarce_mdm.py, masked diffusion with the same net.
#
#   python train.py config/scarce_ar.py
#   python train.py config/scarce_mdm.py
#   python eval.py --metric=curves --runs='out-scarce-*'
#
# What was measured is in tests/BENCHMARKS.md (arXiv 2507.15857, 2511.03276).

out_dir = 'out-scarce-ar'
dataset = 'stdlib'
tokenizer = 'bpe-4096'
packing = 'concat'
block_size = 128
batch_size = 32
global_batch_size = 32

n_layer = 4
n_head = 3
n_embd = 192
cond_dim = 0
mlp = 'relu'
qkv_bias = True
unigram_bias = True
tied = True
embed_norm = True
dropout = 0.0
causal = True
objective = 'ar'

optimizer = 'muon'
learning_rate = 6e-3  # of 3e-3 and 6e-3 the better after three epochs
max_iters = 2880  # 20 epochs
lr_schedule = 'constant'  # every step is the end of a run of its own
warmup_iters = 50
beta2 = 0.99
ema = 0.99

eval_interval = 144  # an epoch
eval_iters = 0
ckpt_interval = 1440
log_interval = 144
sample_at_end = False
