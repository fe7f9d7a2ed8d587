# SMDM: a LLaMA-style masked diffusion model on SlimPajama.
#
#   python data.py --dataset=slimpajama --tokenizer=meta-llama/Llama-2-7b-hf
#   torchrun --nproc_per_node=8 train.py config/smdm_mdm.py --size=170M --flops=1e19
#
# Hardware: 8 GPUs of 80 GB, 16 rows each, two micro-batches a step. Any of the 30 sizes of
# model.SIZES from 6M to 2121M.
# Published: the scaling laws of SMDM (Nie et al. 2024, arXiv 2410.18514), budgets of 6e18 to 1e20
# FLOPs. The learning rate is the released code's; the paper says 4e-4 to 4e-5.

out_dir = 'out-smdm_mdm'
dataset = 'slimpajama'  # without its GitHub part
tokenizer = 'meta-llama/Llama-2-7b-hf'
packing = 'concat'
block_size = 2048
batch_size = 16
global_batch_size = 256
ssl_ratio = 0.01  # micro-batches cut to a random length,
ssl_group = 8  # the same one on all 8 GPUs, which are seeded alike

size = '170M'
cond_dim = 0
norm = 'rmsnorm'
mlp = 'swiglu'
mlp_bias = False
head_bias = False
rotary_bf16 = True
dropout = 0.0
init = 'smdm'
head_mask = False  # the mask is never predicted
objective = 'subs'
schedule_parameters = dict(eps=0.0)  # masked with probability p = (1 - sampling_eps) u +
sampling_eps = 1e-3  # sampling_eps, weight 1/p,
time_sampling = 'iid'  # u uniform in [0, 1) of each row by itself
loss_norm = 'micro'  # one that is cut counts like any other

learning_rate = 2e-4
flops = 1e19  # sets max_iters
lr_schedule = 'cosine'
min_lr = 2e-5
warmup_iters = 100
lr_offset = 0
warmup_share = 0.01
weight_decay = 0.1
decay_all = True
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
ema = 0.0  # none: the average is the weights themselves

eval_interval = 1000
ckpt_interval = 1000
