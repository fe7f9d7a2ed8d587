# SMDM's autoregressive baseline on the first rounds of ShareGPT, for MT-bench.
#
#   python data.py --dataset=sharegpt --input=ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json \
#       --tokenizer=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --name=sharegpt
#   torchrun --nproc_per_node=8 train.py config/sft_sharegpt_ar.py
#
# Hardware: released for 8 GPUs, 8 rows each, four micro-batches a step. One GPU of 80 GB will do,
# by hand: 23 GB as in sft_gsm8k.py, 2 GB of bfloat16 copies, the activations of 8 x 2,048 tokens
# about 36 GB. --shard=True divides the first by the number of processes.
# Released: 651 steps, 3 epochs of 55,612 rows.

out_dir = 'out-sft-sharegpt-ar'
init_from = 'nieshen/SMDM:ar_safetensors/ar-1028M-100e18.safetensors'
dataset = 'sharegpt'
val_split = 'train'
packing = 'pair'
pad_to = 'batch'  # released: to the longest row of each micro-batch, not of the step
block_size = 2048
batch_size = 8
global_batch_size = 256
epochs = 3
dropout = 0.0
causal = True
objective = 'ar'
loss_norm = 'micro'  # micro-batches count alike, however long their answers

learning_rate = 2e-4
lr_schedule = 'cosine'
min_lr = 2e-5
warmup_iters = 200
lr_offset = 3 / 4  # set for each of four micro-batches
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
