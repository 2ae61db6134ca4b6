//! flash-attn's `Wqkv`, with `out_proj` (MPT, DBRX, Nomic BERT) or `Wo` (ModernBERT).

use crate::checkpoint::layout::plan::{Entry, INV_FREQ, Table};

pub(super) static OUT_PROJ: Table = Table {
    entries: &[
        WEIGHT,
        BIAS,
        Entry::of("out_proj.weight", &["o_proj.weight"]),
        Entry::of("out_proj.bias", &["o_proj.bias"]),
    ],
    ignored: INV_FREQ,
    check: |_| Ok(()),
};

pub(super) static WO: Table = Table {
    entries: &[WEIGHT, BIAS, Entry::of("Wo.weight", &["o_proj.weight"]), Entry::of("Wo.bias", &["o_proj.bias"])],
    ignored: INV_FREQ,
    check: |_| Ok(()),
};

const WEIGHT: Entry = Entry::of("Wqkv.weight", &["q_proj.weight", "k_proj.weight", "v_proj.weight"]);
const BIAS: Entry = Entry::of("Wqkv.bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]);
