# See a masked diffusion language model learn in three minutes, offline, on 2 CPU cores.
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
batch_size = 16  # two micro-batches a step: one or two processes do the same work
global_batch_size = 32

n_layer = 4
n_head = 3
n_embd = 192
cond_dim = 0  # no conditioning: it would be fed sigma = 0 always
mlp = 'relu'  # faster than gelu on a CPU
dropout = 0.0
objective = 'mlm'  # cross entropy at the masked positions: less noisy than the NELBO

optimizer = 'muon'  # at this budget well ahead of adamw
learning_rate = 6e-3
max_iters = 450  # 1.8M tokens, three times the text
lr_schedule = 'cosine'
warmup_iters = 50
beta2 = 0.99
ema = 0.99

eval_interval = 150
eval_iters = 10
sample_interval = 150  # and one before training
ckpt_interval = 150
log_interval = 10
