//! Heat maps as a PNG picture: the SVG, drawn here.

use std::path::Path;

use candle_core::{Error, Result};
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

use super::Heatmap;
use super::label::{FONT, Ruler};
use crate::error::AttentionError;
use crate::file;

/// For screens with small pixels.
const ZOOM: f32 = 2.0;
/// A picture with more pixels, 128 MiB of them, is drawn without zoom.
const MAX_ZOOMED: f32 = 32.0 * 1024.0 * 1024.0;

impl Heatmap {
    /// The picture of [`Heatmap::to_svg`] as the bytes of a PNG file, at twice its size. Needs the feature `png`.
    ///
    /// The font comes with the crate; characters that it lacks are taken from the fonts of the system, if there are any.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::to_svg`].
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let svg = self.to_svg()?;
        let mut options = Options { font_family: "DejaVu Sans".into(), ..Default::default() };
        options.fontdb_mut().load_font_data(FONT.to_vec());
        if !Ruler::new().knows(&svg) {
            options.fontdb_mut().load_system_fonts();
        }
        let tree = Tree::from_str(&svg, &options).map_err(Error::wrap)?;
        let size = tree.size();
        let zoom = if size.width() * size.height() * ZOOM * ZOOM > MAX_ZOOMED { 1.0 } else { ZOOM };
        let pixels = [size.width(), size.height()].map(|side| (side * zoom).ceil() as u32);
        let mut picture = Pixmap::new(pixels[0], pixels[1]).ok_or(AttentionError::Number {
            name: "pixels in a heat map",
            expected: "as many as memory holds; show some of the heads",
            got: f64::from(pixels[0]) * f64::from(pixels[1]),
        })?;
        resvg::render(&tree, Transform::from_scale(zoom, zoom), &mut picture.as_mut());
        picture.encode_png().map_err(Error::wrap)
    }

    /// Writes the picture of [`Heatmap::to_png`] to a file: the whole file or nothing. Needs the feature `png`.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::to_svg`], and a file that can't be written.
    pub fn save_png(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(file::write(path.as_ref(), &self.to_png()?)?)
    }
}
