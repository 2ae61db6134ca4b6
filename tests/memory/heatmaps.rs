//! Heat maps.

use attention_heatmap::{Colour, Heatmap, HeatmapError, Page};
use candle_attention::{AttentionError, Error};

use crate::room::{fills_up, memory, returns};

/// The error of memory as that of attention, for the helpers.
fn same<T>(result: Result<T, HeatmapError>) -> Result<T, Error> {
    result.map_err(|error| match error {
        HeatmapError::Memory { what, bytes } => AttentionError::Memory { what, bytes }.into(),
        other => panic!("{other:?}"),
    })
}

memory! {
    heatmap_of_many_weights: {
        let weights = vec![0.5f32; 8 << 20];
        fills_up(|| same(Heatmap::new(&weights, &["warm", "mat"])));
        fills_up(|| same(Heatmap::between(&weights, &["warm", "mat"], &["a", "b"])));
    };
    heatmap_of_long_labels: {
        let label = "\u{1}".repeat(1 << 18);
        fills_up(|| same(Heatmap::new(&[1.0], &[&label])));
        fills_up(|| same(Heatmap::new(&[1.0], &["a"]).and_then(|map| map.titled(&[&label]))));
    };
    outputs: {
        let (weights, tokens) = (vec![0.5f32; 16 * 128 * 128], vec!["token"; 128]);
        let map = Heatmap::new(&weights, &tokens).unwrap();
        returns(|| same(map.to_text(Colour::Always)));
        returns(|| same(map.to_svg()));
        let page = (0..8).fold(Page::new("page"), |page, _| page.layer("layer", map.clone()));
        returns(|| same(page.to_html()));
    };
}
