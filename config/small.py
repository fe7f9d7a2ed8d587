# Your own text on a laptop: a few megabytes, in about five minutes on 2 CPU cores.
#
#   python train.py config/small.py --dataset=text:corpus.txt
#   python sample.py --out_dir=out-small --num_samples=4 --top_p=0.95
#   python eval.py --out_dir=out-small
#
# corpus.txt: any text whose documents are separated by blank lines; a .jsonl file with a field
# "text", or a folder of either, will do as well. Shakespeare's plays, 1.1 MB (not run here):
# curl -LO https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
#
# The loss is still falling at the end: with more text and time, raise max_iters, then n_layer and
# n_embd.

out_dir = 'out-small'
dataset = 'stdlib'  # where no other is given
tokenizer = 'bpe-2048'  # trained on the text itself, in data/<name of the text>-bpe-2048
packing = 'concat'
block_size = 128
batch_size = 16
global_batch_size = 16  # few tokens a step, many steps

n_layer = 4
n_head = 3
n_embd = 192
cond_dim = 0
mlp = 'relu'
qkv_bias = True  # heads look at near tokens from the start
unigram_bias = True
tied = True
embed_norm = True
dropout = 0.0
objective = 'mlm'
t_range = (1e-3, 0.7)
ar_share = 0.15  # the first steps train it as a causal net, which learns from every token

optimizer = 'muon'
learning_rate = 6e-3
max_iters = 2000
lr_schedule = 'linear'
warmup_iters = 20
momentum = 0.9
beta2 = 0.99
ema = 0.99

eval_interval = 400
eval_iters = 20
sample_interval = 400  # one sample on the way, after each evaluation
ckpt_interval = 400
