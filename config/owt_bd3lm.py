# Block diffusion, BD3-LM, on OpenWebText (Arriola et al. 2025, arXiv 2503.09573), 170M parameters:
# MDLM's weights of 850k steps, fine-tuned for 150k in blocks of 16 tokens.
#
#   python data.py --dataset=openwebtext --tokenizer=gpt2
#   torchrun --nproc_per_node=8 train.py config/owt_bd3lm.py
#   python sample.py --out_dir=out-owt-bd3lm --length=2048 --steps=5000 --top_p=0.9
#   python eval.py --init_from=kuleshov-group/bd3lm-owt-block_size16 --dataset=openwebtext
#
# Hardware: 8 GPUs of 80 GB, 16 rows each, four micro-batches a step.
# Published test perplexities, at most: 22.27 with a block_length of 16, 21.68 with 8, 20.73 with 4
# (MDLM 22.98, AR 17.54). The release searches for t_range after each evaluation; on LM1B it found
# (0.3, 0.8) for 16 and (0.45, 0.95) for 4.

out_dir = 'out-owt-bd3lm'
init_from = 'kuleshov-group/bd3lm-owt-block_size1024-pretrain'
dataset = 'openwebtext'
tokenizer = 'gpt2'
packing = 'concat'  # no BOS and EOS around a row
first_given = True
block_size = 1024
batch_size = 16
global_batch_size = 512

block_length = 16
t_range = (0.3, 0.8)
dropout = 0.1
objective = 'subs'
time_sampling = 'per_process'

learning_rate = 3e-4
max_iters = 150_000
lr_schedule = 'constant'
warmup_iters = 2500
weight_decay = 0.0
grad_clip = 1.0
ema = 0.9999

eval_interval = 10_000
eval_iters = 0  # all of val_split
ckpt_interval = 2500
keep_interval = 50_000
