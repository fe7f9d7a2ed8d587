# SMDM on the first rounds of ShareGPT, for MT-bench.
#
#   python data.py --dataset=sharegpt --input=ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json \
#       --tokenizer=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --name=sharegpt
#   torchrun --nproc_per_node=8 train.py config/sft_sharegpt.py
#
# Hardware: released for 8 GPUs, 4 rows each, eight micro-batches a step. One GPU of 80 GB will do,
# by hand: 23 GB as in sft_gsm8k.py, 2 GB of bfloat16 copies, the activations of 4 x 2,048 tokens
# about 18 GB. --shard=True divides the first by the number of processes.
# Released: 651 steps, 3 epochs of 55,612 rows.

out_dir = 'out-sft-sharegpt'
init_from = 'nieshen/SMDM:mdm_safetensors/mdm-1028M-1600e18.safetensors'
dataset = 'sharegpt'
val_split = 'train'
packing = 'pair'
pad_to = 'batch'  # released: to the longest row of each micro-batch, not of the step
prompt_drop = 0.0  # for guidance without supervision; 0.1: for standard guidance
block_size = 2048
batch_size = 4
global_batch_size = 256
epochs = 3
dropout = 0.0
objective = 'subs'
schedule_parameters = dict(eps=0.0)  # masked with probability p = (1 - sampling_eps) u +
sampling_eps = 1e-3  # sampling_eps, weight 1/p,
time_sampling = 'iid'  # u uniform in [0, 1) of each row by itself
loss_norm = 'micro'  # micro-batches count alike, whatever they score

learning_rate = 2e-4
lr_schedule = 'cosine'
min_lr = 2e-5
warmup_iters = 200
lr_offset = 7 / 8  # set for each of eight micro-batches
weight_decay = 0.1
decay_all = True
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
ema = 0.0
seed = 3407

eval_interval = 5000
ckpt_interval = 5000
sample_at_end = False
