//! Layouts as text.

use candle_attention::Layout;

#[test]
fn every_layout_comes_back_from_its_name() -> anyhow::Result<()> {
    for &layout in Layout::ALL {
        assert_eq!(layout.to_string().parse::<Layout>()?, layout);
        // JSON has the same name.
        assert_eq!(serde_json::to_value(layout)?, layout.to_string());
        assert_eq!(serde_json::from_value::<Layout>(layout.to_string().into())?, layout);
    }
    let names: Vec<String> = Layout::ALL.iter().map(Layout::to_string).collect();
    for name in ["own", "torch", "bert", "gpt2", "gpt_neox", "llama", "out_proj", "qkv_proj", "wqkv"] {
        assert!(names.contains(&name.to_string()), "{name}");
    }
    Ok(())
}

#[test]
fn unknown_name_is_told_the_known_ones() {
    for unknown in ["", "Torch", "gpt-2", "bert ", "layouts"] {
        let error = unknown.parse::<Layout>().unwrap_err().to_string();
        assert!(error.contains(&format!("got `{unknown}`")), "{error}");
        for layout in Layout::ALL {
            assert!(error.contains(&layout.to_string()), "{layout} is not in: {error}");
        }
    }
}
