//! OPT, BART, Whisper, CLIP and others whose W_O is `out_proj`.

use crate::checkpoint::layout::plan::{Entry, Table};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("q_proj.weight", &["q_proj.weight"]),
        Entry::of("q_proj.bias", &["q_proj.bias"]),
        Entry::of("k_proj.weight", &["k_proj.weight"]),
        Entry::of("k_proj.bias", &["k_proj.bias"]),
        Entry::of("v_proj.weight", &["v_proj.weight"]),
        Entry::of("v_proj.bias", &["v_proj.bias"]),
        Entry::of("out_proj.weight", &["o_proj.weight"]),
        Entry::of("out_proj.bias", &["o_proj.bias"]),
    ],
    ignored: &[],
    check: |_| Ok(()),
};
