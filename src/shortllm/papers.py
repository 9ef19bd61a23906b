"""The papers behind the methods: what a page links to, and a model card cites."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """One paper on arXiv; as text it is a short citation."""

    key: str
    authors: str
    """As BibTeX has them: 'Last, First and Last, First'."""
    title: str
    arxiv: str

    def __str__(self) -> str:
        return f"{self.short}, {self.title.split(':')[0]}, arXiv:{self.arxiv}"

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def year(self) -> str:
        """Year of its arXiv number."""
        return f"20{self.arxiv[:2]}"

    @property
    def short(self) -> str:
        """First author and year."""
        return f"{self.authors.split(',')[0]} et al. {self.year}"

    @property
    def bibtex(self) -> str:
        """The entry for a bibliography."""
        return (
            f"@article{{{self.key},\n"
            f"  title   = {{{self.title}}},\n"
            f"  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"  year    = {{{self.year}}},\n"
            "}"
        )


SHORTENED_LLAMA = Paper(
    key="kim2024shortened",
    authors="Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and "
    "Choi, Shinkook and Shin, Junho and Song, Hyoung-Kyu",
    title="Shortened LLaMA: Depth Pruning for Large Language Models "
    "with Comparison of Retraining Methods",
    arxiv="2402.02834",
)
SPECULATIVE_DECODING = Paper(
    key="leviathan2023fast",
    authors="Leviathan, Yaniv and Kalman, Matan and Matias, Yossi",
    title="Fast Inference from Transformers via Speculative Decoding",
    arxiv="2211.17192",
)
EVOPRESS = Paper(
    key="sieberling2024evopress",
    authors="Sieberling, Oliver and Kuznedelev, Denis and Kurtic, Eldar and Alistarh, Dan",
    title="EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
    arxiv="2410.14649",
)
SHORTGPT = Paper(
    key="men2024shortgpt",
    authors="Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and "
    "Lu, Yaojie and Han, Xianpei and Chen, Weipeng",
    title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arxiv="2403.03853",
)
DEEPER_LAYERS = Paper(
    key="gromov2024unreasonable",
    authors="Gromov, Andrey and Tirumala, Kushal and Shapourian, Hassan and Glorioso, Paolo and "
    "Roberts, Daniel A.",
    title="The Unreasonable Ineffectiveness of the Deeper Layers",
    arxiv="2403.17887",
)
SLEB = Paper(
    key="song2024sleb",
    authors="Song, Jiwon and Oh, Kyungseok and Kim, Taesu and Kim, Hyungjun and Kim, Yulhwa and "
    "Kim, Jae-Joon",
    title="SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer "
    "Blocks",
    arxiv="2402.09025",
)
LLM_PRUNER = Paper(
    key="ma2023llmpruner",
    authors="Ma, Xinyin and Fang, Gongfan and Wang, Xinchao",
    title="LLM-Pruner: On the Structural Pruning of Large Language Models",
    arxiv="2305.11627",
)
FLAP = Paper(
    key="an2023fluctuation",
    authors="An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao",
    title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arxiv="2312.11983",
)
BLOCKPRUNER = Paper(
    key="zhong2024blockpruner",
    authors="Zhong, Longguang and Wan, Fanqi and Chen, Ruijun and Quan, Xiaojun and Li, Liangzhi",
    title="BlockPruner: Fine-grained Pruning for Large Language Models",
    arxiv="2406.10594",
)
WHAT_MATTERS = Paper(
    key="he2024matters",
    authors="He, Shwai and Sun, Guoheng and Shen, Zheyu and Li, Ang",
    title="What Matters in Transformers? Not All Attention is Needed",
    arxiv="2406.15786",
)
REPLACE_ME = Paper(
    key="shopkhoev2025replaceme",
    authors="Shopkhoev, Dmitriy and Ali, Ammar and Zhussip, Magauiya and Malykh, Valentin and "
    "Lefkimmiatis, Stamatios and Komodakis, Nikos and Zagoruyko, Sergey",
    title="ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
    arxiv="2505.02819",
)
PRUNE_AND_COMP = Paper(
    key="chen2025prunecomp",
    authors="Chen, Xinrui and Zhang, Hongxing and Zeng, Fanyi and Wei, Yongxian and Wang, Yizhi "
    "and Ling, Xitong and Li, Guanghao and Yuan, Chun",
    title="Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude "
    "Compensation",
    arxiv="2507.18212",
)
LACO = Paper(
    key="yang2024laco",
    authors="Yang, Yifei and Cao, Zouying and Zhao, Hai",
    title="LaCo: Large Language Model Pruning via Layer Collapse",
    arxiv="2402.11187",
)
GPTQ = Paper(
    key="frantar2022gptq",
    authors="Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan",
    title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arxiv="2210.17323",
)
LORA = Paper(
    key="hu2021lora",
    authors="Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and "
    "Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    arxiv="2106.09685",
)
DISTILLATION = Paper(
    key="hinton2015distilling",
    authors="Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    title="Distilling the Knowledge in a Neural Network",
    arxiv="1503.02531",
)
LAST_BLOCKS = Paper(
    key="lu2024reassessing",
    authors="Lu, Yao and Cheng, Hao and Fang, Yujie and Wang, Zeyu and Wei, Jiaheng and "
    "Xu, Dongwei and Xuan, Qi and Yang, Xiaoniu and Zhu, Zhaowei",
    title="Reassessing Layer Pruning in LLMs: New Insights and Methods",
    arxiv="2411.15558",
)
CLASP = Paper(
    key="chen2025clasp",
    authors="Chen, Longze and Shan, Renke and Wang, Huiming and Wang, Lu and Liu, Ziqiang and "
    "Luo, Run and Wang, Jiawei and Alinejad-Rokny, Hamid and Yang, Min",
    title="CLaSp: In-Context Layer Skip for Self-Speculative Decoding",
    arxiv="2505.24196",
)
LORP = Paper(
    key="yun2026locality",
    authors="Yun, Vincent-Daniel and Kim, Youngrae and Lim, Woosang and Heo, YoungJin and "
    "Kim, Minkyu and Lee, Sunwoo",
    title="Locality-Aware Redundancy Pruning for LLM Depth Compression",
    arxiv="2605.27786",
)
FINERCUT = Paper(
    key="zhang2024finercut",
    authors="Zhang, Yang and Li, Yawei and Wang, Xinpeng and Shen, Qianli and Plank, Barbara and "
    "Bischl, Bernd and Rezaei, Mina and Kawaguchi, Kenji",
    title="FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models",
    arxiv="2405.18218",
)
