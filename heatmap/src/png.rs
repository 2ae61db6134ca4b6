//! Heat maps as a PNG picture. The SVG is drawn here.

use std::path::Path;

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

use crate::font::{FONT, Ruler};
use crate::{Heatmap, HeatmapError, memory};

/// Pixels of the picture for each pixel of the SVG, so that text is sharp on a screen with small pixels.
const ZOOM: f32 = 2.0;
/// A picture that would have more pixels at [`ZOOM`] is drawn without zoom. So many pixels take 128 MiB.
const MAX_ZOOMED: f32 = 32.0 * 1024.0 * 1024.0;
/// So many pixels take 1 GiB, and as much again while the file is made.
const MAX_PIXELS: u64 = 1 << 28;

impl Heatmap {
    /// Draws the picture of [`Heatmap::to_svg`] at twice its size, as the bytes of a PNG file. Needs the feature `png`.
    ///
    /// The font comes with the crate. Characters that it lacks are taken from the system's fonts, if there are any.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::to_svg`]. [`HeatmapError::TooManyPixels`] for more than 2^28 pixels. [`HeatmapError::Drawing`] if
    /// the library that draws the SVG fails.
    pub fn to_png(&self) -> Result<Vec<u8>, HeatmapError> {
        let picture = self.picture()?;
        let (width, height) = picture.size();
        let (zoom, [width, height]) = zoom(width as f32, height as f32)?;
        // Two pictures of four bytes for each pixel: one is drawn, the other becomes the file.
        memory::ask("PNG", (width as usize).saturating_mul(height as usize).saturating_mul(8))?;
        let svg = picture.draw();
        let mut options = Options { font_family: "DejaVu Sans".into(), ..Default::default() };
        options.fontdb_mut().load_font_data(FONT.to_vec());
        if !Ruler::new().knows(&svg) {
            options.fontdb_mut().load_system_fonts();
        }
        let tree = Tree::from_str(&svg, &options).map_err(|error| failure(&error))?;
        let mut pixels = Pixmap::new(width, height).ok_or_else(|| too_many_pixels(width, height))?;
        resvg::render(&tree, Transform::from_scale(zoom, zoom), &mut pixels.as_mut());
        pixels.encode_png().map_err(|error| failure(&error))
    }

    /// Writes the picture of [`Heatmap::to_png`] to a file: the whole file or nothing. Needs the feature `png`.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::to_png`]. [`HeatmapError::File`] if the file can't be written.
    pub fn save_png(&self, path: impl AsRef<Path>) -> Result<(), HeatmapError> {
        Ok(attention_files::write(path.as_ref(), &self.to_png()?)?)
    }
}

/// The pixels of the picture for each pixel of an SVG of this size, and the size of the picture.
fn zoom(width: f32, height: f32) -> Result<(f32, [u32; 2]), HeatmapError> {
    let zoom = if width * height * ZOOM * ZOOM > MAX_ZOOMED { 1.0 } else { ZOOM };
    let [width, height] = [width, height].map(|side| (side * zoom).ceil() as u32);
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(too_many_pixels(width, height));
    }
    Ok((zoom, [width, height]))
}

fn too_many_pixels(width: u32, height: u32) -> HeatmapError {
    HeatmapError::TooManyPixels { max: MAX_PIXELS, width, height }
}

fn failure(error: &dyn std::error::Error) -> HeatmapError {
    HeatmapError::Drawing { output: "PNG", cause: error.to_string() }
}
