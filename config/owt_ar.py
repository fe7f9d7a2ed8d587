# MDLM's autoregressive baseline on OpenWebText: the same transformer, but causal and without
# conditioning.
#
#   python data.py --dataset=openwebtext --tokenizer=gpt2
#   torchrun --nproc_per_node=8 train.py config/owt_ar.py
#
# Hardware: 8 GPUs of 80 GB, 32 rows each, two micro-batches a step.
# Published (MDLM's table 2; 500k steps, as many tokens as MDLM's 1M steps have masked):
# test perplexity 17.5.

out_dir = 'out-owt-ar'
dataset = 'openwebtext'
tokenizer = 'gpt2'
packing = 'wrap'  # 1,022 tokens of the stream between BOS and EOS
block_size = 1024
batch_size = 32
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 0
causal = True
dropout = 0.1
objective = 'ar'

learning_rate = 3e-4
max_iters = 500_000
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
