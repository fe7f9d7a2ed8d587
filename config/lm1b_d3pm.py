# Absorbing D3PM on the One Billion Word benchmark, as MDLM's release trains it for its ablation.
#
#   python data.py --dataset=lm1b --tokenizer=bert-base-uncased
#   torchrun --nproc_per_node=8 train.py config/lm1b_d3pm.py
#
# Hardware: 8 GPUs, 64 rows each.
# Published: MDLM's ablation of the SUBS parameterisation; its figures are for 1M steps.

out_dir = 'out-lm1b_d3pm'
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
time_conditioning = True
dropout = 0.1
objective = 'd3pm'  # its reconstruction term included
T = 1000
subs_masking = False  # the net may give the mask itself a probability
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
