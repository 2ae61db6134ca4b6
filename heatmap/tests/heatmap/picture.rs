//! SVG and PNG.

use attention_heatmap::Heatmap;

use super::{heads, hostile, ramp, softmax, words};

/// The values of an attribute of any element.
fn attributes(svg: &str, name: &str) -> Vec<f64> {
    let marker = format!(" {name}=\"");
    svg.split(&marker).skip(1).filter_map(|rest| rest.split('"').next().unwrap().parse().ok()).collect()
}

#[test]
fn svg_escapes_tokens_and_titles() {
    let heatmap = Heatmap::new(&ramp(1), &["<script>&\""]).unwrap().titled(&["a < b"]).unwrap();
    let svg = heatmap.to_svg().unwrap();
    assert!(svg.contains("&lt;script&gt;&amp;") && svg.contains("a &lt; b") && !svg.contains("<script>"));
    let svg = hostile().to_svg().unwrap();
    assert!(svg.chars().all(|c| c == '\n' || !c.is_control()), "XML forbids control characters");
    assert!(!svg.contains(['\u{ffff}', '\u{202e}', '\u{2028}']));
}

#[test]
fn few_tokens_have_a_number_in_every_cell() {
    for (heatmap, cells) in [(heads(1, 4), 16), (heads(2, 10), 200), (heads(1, 16), 256)] {
        let svg = heatmap.to_svg().unwrap();
        let numbers = svg.split("fill=\"#1d2330\">").skip(1).chain(svg.split("fill=\"#ffffff\">").skip(1));
        assert_eq!(numbers.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())).count(), cells);
    }
}

#[test]
fn colours_run_from_nothing_to_the_greatest_weight() {
    let weights = ramp(4).iter().map(|weight| weight * 0.01).collect::<Vec<_>>();
    let svg = Heatmap::new(&weights, &words(4)).unwrap().to_svg().unwrap();
    assert!(svg.contains("#f6f8fb") && svg.contains("#0c2154"), "the ends of the scale");
    assert!(svg.contains(">0</text>") && svg.contains(">0.0100</text>"), "the ends of the bar: {svg}");
}

#[test]
fn every_cell_of_every_head_is_drawn() {
    // Each weight differs from its neighbours and from 0, so that each is a path of its own.
    for (heads, tokens) in [(1, 4), (5, 16), (12, 20)] {
        let weights = (0..heads * tokens * tokens).map(|i| if i % 2 == 0 { 1.0 } else { 0.5 }).collect::<Vec<_>>();
        let svg = Heatmap::new(&weights, &words(tokens)).unwrap().to_svg().unwrap();
        assert_eq!(svg.matches("h1v1h-1z").count(), heads * tokens * tokens);
        assert_eq!(svg.matches("<g transform").count(), heads);
    }
}

#[test]
fn labels_of_neighbours_do_not_overlap() {
    for tokens in [3, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128] {
        for count in [1, 2, 12] {
            let svg = if tokens > 64 && count == 12 { continue } else { heads(count, tokens).to_svg().unwrap() };
            let cell = svg.split("scale(").nth(1).unwrap().split(')').next().unwrap().parse::<f64>().unwrap();
            let font = attributes(&svg, "font-size").into_iter().fold(f64::MAX, f64::min);
            assert!(font * 1.16 <= cell, "{tokens} tokens, {count} heads: letters of {font} in {cell}");
            assert!(font >= 8.0, "letters of {font} can't be read");
        }
    }
}

#[test]
fn nothing_lies_outside_the_picture() {
    let long = "unbelievably_long_".repeat(20);
    let maps = [
        heads(1, 3),
        heads(12, 4),
        heads(12, 64),
        hostile(),
        Heatmap::new(&softmax(2, 2, 2), &[&long, &long]).unwrap().titled(&[&long, "b"]).unwrap(),
        Heatmap::between(&softmax(1, 64, 3), &words(64), &words(3)).unwrap(),
    ];
    for heatmap in maps {
        let svg = heatmap.to_svg().unwrap();
        let (width, height) = (attributes(&svg, "width")[0], attributes(&svg, "height")[0]);
        assert!(attributes(&svg, "x").iter().all(|&x| (0.0..width).contains(&x)));
        assert!(attributes(&svg, "y").iter().all(|&y| (0.0..height).contains(&y)));
        for point in svg.split("translate(").skip(1) {
            let point = point.split([' ', ')']).take(2).map(|part| part.parse::<f64>().unwrap()).collect::<Vec<_>>();
            assert!(point[0] < width && point[1] < height, "{point:?} in {width} x {height}");
        }
    }
}

#[cfg(feature = "png")]
mod png {
    use super::*;
    use attention_heatmap::HeatmapError;
    use resvg::tiny_skia::{Pixmap, PremultipliedColorU8};

    fn drawn(heatmap: &Heatmap) -> Pixmap {
        Pixmap::decode_png(&heatmap.to_png().unwrap()).unwrap()
    }

    fn is_white(pixel: &PremultipliedColorU8) -> bool {
        (pixel.red(), pixel.green(), pixel.blue(), pixel.alpha()) == (255, 255, 255, 255)
    }

    #[test]
    fn picture_is_the_svg_at_twice_its_size() {
        let heatmap = heads(2, 5);
        let svg = heatmap.to_svg().unwrap();
        let picture = drawn(&heatmap);
        assert_eq!(f64::from(picture.width()), 2.0 * attributes(&svg, "width")[0]);
        assert_eq!(f64::from(picture.height()), 2.0 * attributes(&svg, "height")[0]);
    }

    /// The text is drawn in the font that was measured, so the margin stays free whatever the tokens are.
    #[test]
    fn nothing_is_cut_off() {
        let long = "W".repeat(300);
        let maps = [
            heads(1, 4),
            heads(1, 16),
            heads(1, 64),
            heads(12, 16),
            Heatmap::new(&softmax(1, 2, 2), &[&long, "a"]).unwrap().titled(&[&long]).unwrap(),
            hostile(),
        ];
        for (i, heatmap) in maps.iter().enumerate() {
            let picture = drawn(heatmap);
            let (width, height) = (picture.width() as usize, picture.height() as usize);
            for (index, pixel) in picture.pixels().iter().enumerate() {
                let (x, y) = (index % width, index / width);
                let border = x.min(width - 1 - x).min(y.min(height - 1 - y));
                assert!(border >= 24 || is_white(pixel), "picture {i}: something at {x}, {y} of {width} x {height}");
            }
        }
    }

    #[test]
    fn labels_are_drawn_without_a_font_of_the_system() {
        // The two pictures differ only in the labels to the left of the matrix and on top of it.
        let [one, other] = ["warm", "cold"].map(|word| drawn(&Heatmap::new(&ramp(2), &[word, "mat"]).unwrap()));
        assert_ne!(one.data(), other.data());
    }

    #[test]
    fn hostile_tokens_are_drawn() {
        for token in super::super::HOSTILE {
            drawn(&Heatmap::new(&ramp(1), &[token]).unwrap());
        }
    }

    #[test]
    fn files_hold_what_was_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let heatmap = heads(1, 3);
        heatmap.save_png(folder.path().join("a.png")).unwrap();
        assert_eq!(std::fs::read(folder.path().join("a.png")).unwrap(), heatmap.to_png().unwrap());
    }

    #[test]
    fn more_pixels_than_memory_should_hold_are_refused() {
        // A single head may have 300 pixels of title. The weights stay within the limit of the SVG.
        let titles = vec!["W".repeat(40); 1 << 14];
        let heads = Heatmap::new(&vec![1.0; 1 << 14], &["a"]).unwrap().titled(&titles).unwrap();
        let error = heads.to_png().unwrap_err();
        assert!(matches!(error, HeatmapError::TooManyPixels { max: 268_435_456, .. }), "{error:?}");
        assert!(error.to_string().contains("at most 268435456 pixels"), "{error}");
    }

    /// Pictures to look at: `HEATMAP_PICTURES=folder cargo test -p attention-heatmap --features png pictures`.
    #[test]
    fn pictures_to_look_at_are_written() {
        let Ok(folder) = std::env::var("HEATMAP_PICTURES") else { return };
        let folder = std::path::Path::new(&folder);
        let before_after = heads(2, 10).titled(&["before training", "after training"]).unwrap();
        let maps = [
            ("4", heads(1, 4)),
            ("16", heads(1, 16)),
            ("64", heads(1, 64)),
            ("12x4", heads(12, 4)),
            ("12x16", heads(12, 16)),
            ("12x64", heads(12, 64)),
            ("128", heads(1, 128)),
            ("hostile", hostile()),
            ("before_after", before_after),
        ];
        for (name, heatmap) in maps {
            heatmap.save_svg(folder.join(format!("{name}.svg"))).unwrap();
            heatmap.save_png(folder.join(format!("{name}.png"))).unwrap();
        }
    }
}
