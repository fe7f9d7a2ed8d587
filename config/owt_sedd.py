# SEDD with absorbing noise on OpenWebText, as MDLM's release trains it for its baseline
# (Lou et al. 2023, arXiv 2310.16834).
#
#   python data.py --dataset=openwebtext --tokenizer=gpt2
#   torchrun --nproc_per_node=8 train.py config/owt_sedd.py
#
# Hardware: 8 GPUs of 80 GB, 32 rows each, two micro-batches a step.
# Published (MDLM's table 2, 1M steps): test perplexity at most 24.1.

out_dir = 'out-owt-sedd'
dataset = 'openwebtext'
tokenizer = 'gpt2'
packing = 'wrap'
block_size = 1024
batch_size = 32
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 128
time_conditioning = True  # the score depends on the noise level
dropout = 0.1
objective = 'sedd'
time_sampling = 'per_process'  # each micro-batch stratified alone

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
