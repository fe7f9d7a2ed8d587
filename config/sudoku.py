# Sudoku, where the order of filling in matters: 9 x 9, 30 clues, one solution.
#
#   python data.py --dataset=sudoku --tokenizer=bytes --clues=30
#   python train.py config/sudoku.py
#   python eval.py config/eval_sudoku.py --sampler=ancestral
#   python eval.py config/eval_sudoku.py --sampler=fixed --confidence=prob_diff
#   python sample.py --out_dir=out-sudoku --num_samples=1 --trace=sudoku.html --prompt=...81 cells
#
# A row is the puzzle, then its solution. With --objective=ar --causal=True --out_dir=out-sudoku-ar:
# the same net from left to right.
# Published (Kim et al. 2025, arXiv 2502.06768), solved puzzles of a net of 6M parameters: 6.9% in
# random order, 18.5% by top_prob, 89.5% by prob_diff; 9.7% for an ar net of 42M.

out_dir = 'out-sudoku'
dataset = 'sudoku'
tokenizer = 'bytes'
packing = 'pair'
block_size = 164  # BOS, 81 cells, 81 cells, EOS
batch_size = 128
global_batch_size = 128

n_layer = 8
n_head = 8
n_embd = 256
cond_dim = 0
mlp = 'relu'
dropout = 0.0
objective = 'mlm'

optimizer = 'muon'
learning_rate = 3e-3
max_iters = 20_000
lr_schedule = 'cosine'
warmup_iters = 200
beta2 = 0.99
ema = 0.999

eval_interval = 1000
eval_iters = 10
ckpt_interval = 1000
sample_at_end = False
