# The reversal curse on a laptop: who is told of in one order only, is the other order known?
#
#   python data.py --dataset=reverse --input=reverse/all_prompts_train.jsonl \
#       --tokenizer=bpe-4096 --name=reverse
#   python train.py config/sft_small.py
#   python train.py config/sft_small.py --objective=ar --causal=True --out_dir=out-reverse-ar
#   python eval.py --input=reverse config/eval_reverse.py --init_from=out-reverse \
#       --length=40 --cfg_scale=0 --bleu=False
#   python eval.py --input=reverse config/eval_reverse.py --init_from=out-reverse-ar \
#       --length=40 --cfg_scale=0 --bleu=False --sampler=ar
#
# reverse/: the files of github.com/lukasberglund/reversal_curse, data/reverse_experiments: 30 names
# told of before their descriptions, 30 after, 30 in both orders. From scratch, as published results
# start from a net that knows English; what was measured is in tests/BENCHMARKS.md.

out_dir = 'out-reverse'
dataset = 'reverse'
val_split = 'train'
packing = 'pair'
pad_to = 'batch'
block_size = 40  # the longest row
batch_size = 64
global_batch_size = 64

n_layer = 4
n_head = 4
n_embd = 128
cond_dim = 0
mlp = 'relu'
dropout = 0.0
objective = 'mlm'

optimizer = 'muon'
learning_rate = 6e-3
epochs = 60
lr_schedule = 'cosine'
warmup_iters = 50
beta2 = 0.99
ema = 0.99

eval_interval = 500
eval_iters = 10
ckpt_interval = 500
sample_at_end = False
