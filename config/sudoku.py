# Sudoku, where the order of filling in decides: 6 x 6, 12 clues, half an hour on one CPU core.
#
#   python data.py --dataset=sudoku --tokenizer=bytes --box=2x3 --clues=12
#   python train.py config/sudoku.py
#   python eval.py --metric=generation --out_dir=out-sudoku --steps=36 --max_rows=500 \
#       --sampler=fixed --confidence=prob_diff --temperature=0
#   python sample.py --out_dir=out-sudoku --num_samples=1 --steps=36 --temperature=0 \
#       --sampler=fixed --confidence=prob_diff --trace=sudoku.html \
#       --prompt=..6.2.4.2.1.6.....145....3.1.......5     the cells row by row
#
# Another order wants another --samples_dir; from left to right: --objective=ar --causal=True
# --out_dir=out-sudoku-ar. What was measured is in tests/BENCHMARKS.md.
# A row is the puzzle, then its solution. 9 x 9, 50 minutes of one core, solves 72% of the puzzles:
#
#   python data.py --dataset=sudoku --tokenizer=bytes --puzzles=50000 --name=s9
#   python train.py config/sudoku.py --dataset=s9 --block_size=164 --batch_size=64 \
#       --global_batch_size=64 --max_iters=5000 --out_dir=out-s9
#   python eval.py --metric=generation --out_dir=out-s9 --steps=81 --max_rows=500 \
#       --sampler=fixed --confidence=prob_diff --temperature=0
#
# Published for 6M parameters (Kim et al. 2025, arXiv 2502.06768): 6.9% in random order, 18.5% by
# top_prob, 89.5% by prob_diff; 9.7% for an ar net of 42M.

out_dir = 'out-sudoku'
dataset = 'sudoku'
tokenizer = 'bytes'
packing = 'pair'
block_size = 74  # BOS, 36 cells, 36 cells, EOS
batch_size = 128
global_batch_size = 128

n_layer = 4
n_head = 4
n_embd = 128
cond_dim = 0
mlp = 'relu'
dropout = 0.0
objective = 'mlm'

optimizer = 'muon'
learning_rate = 3e-3
max_iters = 2500  # 3.4 times each puzzle
lr_schedule = 'cosine'
warmup_iters = 100
beta2 = 0.99
ema = 0.999

eval_interval = 250
eval_iters = 10
ckpt_interval = 500
sample_at_end = False
