//! The page for the browser. `scripts/browser` opens the pages that the last test writes.

use std::path::Path;

use attention_heatmap::{Heatmap, Page};
use serde_json::Value;

use super::{HOSTILE, heads, hostile, softmax, words};

/// The JSON that the script of the page reads.
fn data(page: &str) -> Value {
    let start = page.find("<script id=\"data\"").unwrap();
    let data = &page[start..];
    let data = &data[data.find('>').unwrap() + 1..data.find("</script>").unwrap()];
    serde_json::from_str(data).unwrap()
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => u32::from(c - b'A'),
        b'a'..=b'z' => u32::from(c - b'a') + 26,
        b'0'..=b'9' => u32::from(c - b'0') + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut bytes = Vec::new();
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = group.iter().fold(0, |bits, &c| bits << 6 | digit(c)) << (6 * (4 - group.len()));
        bytes.extend(&bits.to_be_bytes()[1..group.len()]);
    }
    bytes
}

#[test]
fn page_holds_every_weight_to_four_digits() {
    let wide = softmax(1, 2, 2).into_iter().map(|weight| weight * 300.0 - 100.0).collect();
    for (weights, tokens) in [(softmax(3, 7, 7), 7), (wide, 2)] {
        let page = Page::new("weights").layer("0", Heatmap::new(&weights, &words(tokens)).unwrap()).to_html().unwrap();
        let layer = &data(&page)["layers"][0];
        let (low, high) = (layer["low"].as_f64().unwrap(), layer["high"].as_f64().unwrap());
        let bytes = base64(layer["weights"].as_str().unwrap());
        assert_eq!(bytes.len(), 2 * weights.len());
        for (pair, weight) in bytes.chunks(2).zip(weights) {
            let steps = f64::from(u16::from_le_bytes([pair[0], pair[1]]));
            let decoded = low + (high - low) * steps / 65535.0;
            assert!((decoded - f64::from(weight)).abs() <= (high - low) / 131_000.0, "{decoded} for {weight}");
        }
    }
}

#[test]
fn page_needs_no_network() {
    let page = Page::new("alone").layer("0", heads(2, 5)).to_html().unwrap();
    // The only address is the name of the SVG namespace, which nobody fetches.
    let addresses = page.replace("http://www.w3.org/2000/svg", "");
    for address in ["http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "import("] {
        assert!(!addresses.contains(address), "{address}");
    }
    assert!(page.contains("default-src 'none'"), "the browser enforces it");
}

#[test]
fn tokens_and_names_cannot_leave_their_place() {
    let page = |token: &str| {
        let heatmap = Heatmap::new(&softmax(1, 1, 1), &[token]).unwrap().titled(&[token]).unwrap();
        Page::new(token).layer(token, heatmap).to_html().unwrap()
    };
    let tags = |page: &str| page.matches('<').count();
    for token in HOSTILE {
        let page_of_token = page(token);
        // Neither the data nor the title begins a new tag.
        assert_eq!(tags(&page_of_token), tags(&page("plain")), "{token:?}");
        let data = data(&page_of_token);
        let layer = &data["layers"][0];
        assert_eq!(layer["queries"][0], layer["name"]);
        let shown = layer["queries"][0].as_str().unwrap();
        assert!(!shown.is_empty() && shown.chars().all(|c| !c.is_control()), "{shown:?}");
    }
    assert_eq!(data(&page("<b>\"&'%%data%%"))["layers"][0]["name"], "<b>\"&'%%data%%");
}

#[test]
fn layers_may_differ_in_heads_and_tokens() {
    let cross = Heatmap::between(&softmax(2, 3, 5), &words(3), &words(5)).unwrap();
    let page = Page::new("both").layer("self", heads(4, 6)).layer("cross", cross).to_html().unwrap();
    let layers = &data(&page)["layers"];
    assert_eq!(layers[0]["titles"].as_array().unwrap().len(), 4);
    assert_eq!(layers[1]["queries"].as_array().unwrap().len(), 3);
    assert_eq!(layers[1]["keys"].as_array().unwrap().len(), 5);
}

#[test]
fn twelve_layers_of_twelve_heads_over_128_tokens_are_under_7_megabytes() {
    let folder = std::env::var("HEATMAP_PAGES").unwrap_or(env!("CARGO_TARGET_TMPDIR").into());
    let folder = Path::new(&folder);
    write_pages(folder);
    let bytes = std::fs::metadata(folder.join("large.html")).unwrap().len();
    assert!(bytes < 7_000_000, "{bytes}");
}

fn write_pages(folder: &Path) {
    let mut large = Page::new("12 layers of 12 heads");
    for layer in 0..12 {
        large = large.layer(&format!("layer {layer}"), heads(12, 128));
    }
    let words = "The cat sat on the mat because it is warm".split(' ').collect::<Vec<_>>();
    let small = Heatmap::new(&softmax(1, 10, 10), &words).unwrap();
    let odd = Heatmap::new(&[0.5, 0.25, 0.75, 0.25], &["odd", "even"]).unwrap();
    let cross = Heatmap::between(&softmax(2, 3, 5), &words[..3], &words[5..]).unwrap();
    let mixed = Page::new("<script>").layer("hostile", hostile()).layer("odd", odd).layer("cross", cross);
    for (name, page) in [("small", Page::new("Ten words").layer("0", small)), ("mixed", mixed), ("large", large)] {
        page.save(folder.join(format!("{name}.html"))).unwrap();
    }
}
