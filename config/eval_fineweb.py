# SMDM's temporal shift: how much worse nets predict FineWeb of April than of February 2024.
#
#   for d in 2024-10 2024-18; do python data.py --dataset=fineweb-$d \
#       --tokenizer=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T; done
#   torchrun --nproc_per_node=8 eval.py config/eval_fineweb.py
#
# The first 209,715,200 tokens of each, rows of 2,048, each document begun by BOS and without EOS.
# One net and one dataset: --metric=ppl --dataset=fineweb-2024-10. A part: --max_tokens=1000000.
# Published: figures without numbers; 1,024 draws a row, "down to 16".

metric = 'shift'
nets = (
    'nieshen/SMDM:ar_safetensors/ar-170M-6e18.safetensors',
    'nieshen/SMDM:mdm_safetensors/mdm-170M-100e18.safetensors',
)
datasets = ('fineweb-2024-10', 'fineweb-2024-18')
tokenizer = 'TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T'
block_size = 2048
batch_size = 128
num_mc = 16
seed = 1234
