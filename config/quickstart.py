# See a masked diffusion language model learn in two minutes, offline, on 2 CPU cores.
#
#   python train.py config/quickstart.py
#   python sample.py --out_dir=out-quickstart --num_samples=4 --steps=256 --top_p=0.95
#   python eval.py --out_dir=out-quickstart
#
# The text is the documentation that ships inside CPython. The frequencies of its tokens alone would
# give 2.65 bits/byte.

out_dir = 'out-quickstart'
dataset = 'stdlib'
tokenizer = 'bpe-4096'  # trained on the text itself
packing = 'concat'
block_size = 128
batch_size = 8  # two micro-batches a step: one or two processes do the same work
global_batch_size = 16  # few tokens a step, many steps

n_layer = 4
n_head = 3
n_embd = 192
cond_dim = 0  # no conditioning: it would be fed sigma = 0 always
mlp = 'relu'  # faster than gelu on a CPU
qkv_bias = True  # heads look at near tokens from the start, which takes long to learn
unigram_bias = True
tied = True
embed_norm = True
dropout = 0.0
objective = 'mlm'  # cross entropy at the masked positions: less noisy than the NELBO
t_range = (1e-3, 0.7)  # nearly empty rows teach little, and cost more
ar_share = 0.3  # the first steps train it as a causal net, which learns from every token

optimizer = 'muon'  # at this budget well ahead of adamw
learning_rate = 6e-3
max_iters = 900  # 1.8M tokens, three times the text
lr_schedule = 'linear'
warmup_iters = 20
momentum = 0.9
beta2 = 0.99
ema = 0.99

eval_interval = 300
eval_iters = 20
sample_interval = 300  # and one before training
ckpt_interval = 300
log_interval = 20
