# MDLM with its Mamba backbone on OpenWebText (Sahoo et al. 2024, arXiv 2406.07524, "tiny-dimamba"),
# 80M parameters, 28M of them without embedding and head.
#
#   python data.py --dataset=openwebtext --tokenizer=gpt2
#   torchrun --nproc_per_node=8 train.py config/owt_dimamba.py
#
# Hardware: 8 GPUs of 80 GB, 32 rows each, two micro-batches a step; pip install mamba-ssm there.

out_dir = 'out-owt-dimamba'
dataset = 'openwebtext'
tokenizer = 'gpt2'
packing = 'wrap'
block_size = 1024
batch_size = 32
global_batch_size = 512

mixer = 'mamba'
n_layer = 14
n_embd = 512
cond_dim = 128  # adaLN-zero
norm = 'rmsnorm'
head_bias = False
time_conditioning = False  # always fed sigma = 0
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
