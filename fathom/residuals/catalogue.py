"""The rules in words: update, source, and what the network is before training; ``fathom residuals`` and Table 5 print them."""

from typing import NamedTuple


class Entry(NamedTuple):
    name: str
    equation: str
    source: str
    start: str
    """What the network is at the rule's initialisation."""


CATALOGUE: dict[str, Entry] = {
    "prenorm": Entry("Residual", "h + f(norm h)", "2002.04745", "itself"),
    "full": Entry("AttnRes Full", "Σ_i α_i v_i,  α = softmax(w_l · rms(v_i))", "2603.15031, section 3.1", "PreNorm"),
    "block": Entry("AttnRes Block", "Σ_n α_n b_n + α' b_n^i,  b_n = Σ_{block n} f", "2603.15031, section 3.2", "PreNorm"),
    "rezero": Entry("ReZero", "h + α_l f", "2003.04887", "the identity"),
    "layerscale": Entry("LayerScale", "h + diag(λ_l) f", "2103.17239", "near the identity"),
    "highway": Entry("Highway", "(1 - g) ⊙ h + g ⊙ f,  g = σ(W_l h + b_l)", "1505.00387", "mostly carries"),
    "deepnorm": Entry("DeepNorm", "norm(α h + f(h))", "2203.00555", "post-norm"),
    "keel": Entry("KEEL", "norm'(α h + f(norm h))", "2601.19895", "post-norm"),
    "siamesenorm": Entry("SiameseNorm", "h¹ = norm'(h¹) + c y,  h² = h² + y,  y = f(norm'(h¹) + norm(h²))", "2602.08064", "both"),
    "denseformer": Entry("DenseFormer", "Σ_{j<=i} α_{i,j} X_j after decoder layer i", "2402.02622", "PreNorm"),
    "laurel": Entry("LAuReL", "α_l f + β_l (h + h A_l B_l)", "2411.07501", "PreNorm"),
    "value_residual": Entry("Value residual", "h + f, attention's values λ_1 V_1 + λ_2 V_l", "2410.17897", "half of V_1"),
    "muddformer": Entry("MUDDFormer", "Σ_j A_{i,j} X_j for query, key, value, residual", "2502.12170", "PreNorm"),
    "hyper_connections": Entry("Hyper-Connections", "A_rᵀ H + B ⊗ f(A_mᵀ H)", "2409.19606", "PreNorm"),
    "mhc": Entry("mHC", "H_res H + H_postᵀ f(H_pre H),  H_res doubly stochastic", "2512.24880", "n uneven streams"),
    "mhc_lite": Entry("mHC-lite", "mHC with H_res = Σ_k a_k P_k over permutations", "2601.05732", "n uneven streams"),
    "ddl": Entry("DDL", "(I - β k kᵀ) X + β k vᵀ,  k = f / |f|", "2601.00417", "replaces along f"),
    "mrla": Entry("MRLA", "Σ_i (σ(q_l * v_{l-1}) · σ(k_i * v_i)) λ_i ⊙ v_i", "2302.03985", "PreNorm"),
    "delta": Entry("Delta AttnRes", "r_l + Σ_i α_i v_i,  r_l = Σ_i v_i", "2605.18855", "PreNorm"),
    "lr_attnres": Entry("LR-AttnRes", "Σ_i α_i v_i,  α = softmax(w_l · k_i / sqrt(r)), r-dim keys", "2607.09694", "PreNorm"),
    "mhar": Entry("MHAR", "Σ_i α^h_i v^h_i for each of H heads", "2607.27230", "PreNorm"),
}  # fmt: skip
"""By ``ResidualConfig.rule``. h is h_{l-1}, f is f_l of it (its own norm inside where none is shown), rms(v) a normalised v."""


SWITCHES: dict[str, str] = {
    "query=input": "full, block: the query is a projection of the read before",
    "query=none": "full, block: learned constants instead of scores",
    "activation=sigmoid": "full, block: weights are not normalised",
    "key_norm=false": "full, block: keys are the sources themselves",
    "heads=H": "full, block: each head of D / H channels has its own weights",
    "window=W": "full: the embedding and the latest W outputs",
    "block_size=S": "block, delta, lr_attnres, mhar: S sublayers to a block (num_blocks=N: N blocks)",
    "isolate_embedding=false": "block: the embedding is a term of the first block",
    "gain=false": "full, block, delta, mhar: no learned gain on the key norm",
}
"""The ablation switches by how an arm of a sweep writes them (residuals/ablations.py has their equations)."""
