# Scaling laws by IsoFLOP curves: SMDM's sizes times budgets.
#
#   for f in 6e18 1e19 3e19 6e19 1e20; do for s in 48M 66M 85M 113M 142M 170M 206M
#   do torchrun --nproc_per_node=8 train.py config/smdm_mdm.py --size=$s --flops=$f \
#       --out_dir=out-scaling-$s-$f --init_from=auto; done; done
#   python eval.py config/eval_scaling.py
#
# A budget needs three sizes on both sides of its best one, the laws two budgets. For the ar nets:
# config/smdm_ar.py, and other folders.

metric = 'scaling'
_sizes = '48M', '66M', '85M', '113M', '142M', '170M', '206M'
_budgets = '6e18', '1e19', '3e19', '6e19', '1e20'
runs = tuple(f'out-scaling-{size}-{flops}' for flops in _budgets for size in _sizes)
