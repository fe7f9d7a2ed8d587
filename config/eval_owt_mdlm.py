# MDLM's tables 2 and 3: the perplexity of its OpenWebText checkpoint on OpenWebText (at most 23.2)
# and on seven benchmarks.
#
#   for d in ptb wikitext2 lm1b lambada ag_news scientific_papers_pubmed scientific_papers_arxiv
#   do python data.py --dataset=$d --tokenizer=gpt2; done
#   torchrun --nproc_per_node=8 eval.py config/eval_owt_mdlm.py
#   python data.py --dataset=openwebtext --tokenizer=gpt2
#   torchrun --nproc_per_node=8 eval.py config/eval_owt_mdlm.py --metric=ppl --dataset=openwebtext

metric = 'zero_shot'
init_from = 'kuleshov-group/mdlm-owt'
packing = 'wrap'  # BOS, 1,022 tokens, EOS
block_size = 1024
datasets = (
    'ptb', 'wikitext2', 'lm1b', 'lambada', 'ag_news', 'scientific_papers_pubmed',
    'scientific_papers_arxiv'
)

published = {
    'ptb': 95.26,
    'wikitext2': 32.83,
    'lm1b': 67.01,
    'lambada': 47.52,
    'ag_news': 61.15,
    'scientific_papers_pubmed': 41.89,
    'scientific_papers_arxiv': 37.37,
}
