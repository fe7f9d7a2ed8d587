# MDLM on text8: 27 characters, rows of 256 cropped at random places.
#
#   python data.py --dataset=text8-crop --tokenizer=text8
#   torchrun --nproc_per_node=8 train.py config/text8_mdlm.py
#   python eval.py --out_dir=out-text8-mdlm --split=test      # bits/byte are bits/character here
#
# Hardware: 8 GPUs, 64 rows each, one micro-batch a step.
# Published, in bits per character of the test split: at most 1.40 for nets like SEDD's of this size
# (absorbing), 1.37 for MD4 (Shi et al. 2024, arXiv 2406.04329).

out_dir = 'out-text8-mdlm'
dataset = 'text8-crop'  # 90 million characters; each split is one document
tokenizer = 'text8'
packing = 'crop'
block_size = 256
batch_size = 64
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 128
time_conditioning = False
dropout = 0.1
objective = 'subs'

learning_rate = 3e-4
max_iters = 1_000_000
lr_schedule = 'constant'
warmup_iters = 2500
weight_decay = 0.0
grad_clip = 1.0
ema = 0.9999

eval_interval = 10_000
ckpt_interval = 2500
keep_interval = 100_000
