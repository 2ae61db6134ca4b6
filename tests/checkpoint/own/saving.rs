//! A save replaces the whole file or nothing: if it fails, the earlier file is unchanged and the only file in the
//! folder.

use std::fs;
use std::path::Path;

use candle_attention::{Layout, SelfAttention};
use candle_core::{DType, Device};
use safetensors::SafeTensors;

use crate::common::assert_same_bits;
use crate::layers::{assert_error_says, randomise};

use super::files::odd_layer;

/// The names in a folder, in order.
fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = entries.collect::<std::io::Result<_>>()?;
    names.sort();
    Ok(names)
}

#[track_caller]
fn assert_save_fails(layer: &SelfAttention, path: &Path) {
    assert_error_says(layer.save(path), &[&path.display().to_string(), "can't write"]);
}

#[test]
fn save_leaves_the_file_and_nothing_else() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer.safetensors");
    let layer = odd_layer(DType::F32)?;
    for _ in 0..3 {
        layer.save(&path)?;
        assert_eq!(names(folder.path())?, ["layer.safetensors"]);
        assert_eq!(fs::read(&path)?, layer.to_bytes()?);
    }
    Ok(())
}

#[test]
fn save_replaces_the_earlier_file_as_a_whole() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer");
    fs::write(&path, vec![7; 1 << 16])?;
    let layer = odd_layer(DType::F32)?;
    layer.save(&path)?;
    assert_eq!(fs::read(&path)?, layer.to_bytes()?);
    randomise(&layer, 2)?;
    layer.save(&path)?;
    let loaded = SelfAttention::load(&path, &Device::Cpu)?;
    assert_same_bits(loaded.q_proj().weight(), layer.q_proj().weight(), "the later weight");
    Ok(())
}

#[test]
fn missing_folder_is_not_made() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    assert_save_fails(&odd_layer(DType::F32)?, &folder.path().join("missing/layer.safetensors"));
    assert!(names(folder.path())?.is_empty());
    Ok(())
}

#[test]
fn file_is_no_folder_to_save_into() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    fs::write(&file, "kept")?;
    assert_save_fails(&odd_layer(DType::F32)?, &file.join("layer.safetensors"));
    assert_eq!(fs::read(&file)?, b"kept");
    assert_eq!(names(folder.path())?, ["file"]);
    Ok(())
}

#[test]
fn folder_is_not_replaced_by_a_file() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for inside in [None, Some("kept")] {
        let path = folder.path().join("layer.safetensors");
        fs::create_dir_all(&path)?;
        if let Some(name) = inside {
            fs::write(path.join(name), "kept")?;
        }
        assert_save_fails(&odd_layer(DType::F32)?, &path);
        assert!(path.is_dir());
        assert_eq!(names(&path)?.len(), inside.iter().count());
        assert_eq!(names(folder.path())?, ["layer.safetensors"]);
    }
    Ok(())
}

/// No layer could load such a file. The last one that can be loaded stays.
#[test]
fn layer_that_is_not_finite_is_not_saved() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer.safetensors");
    let layer = odd_layer(DType::F32)?;
    layer.save(&path)?;
    let earlier = fs::read(&path)?;
    let var = layer.vars().remove(0);
    var.set(&(var.as_tensor() * f64::NAN)?)?;
    let expected = "q_proj.weight`: expected finite numbers, got NaN";
    assert_error_says(layer.save(&path), &[expected]);
    assert_error_says(layer.save_layout(Layout::Own, "attn", &path), &[expected]);
    assert_eq!(fs::read(&path)?, earlier);
    Ok(())
}

/// transformers (`load_state_dict`) refuses a file whose metadata doesn't say which framework wrote it.
#[test]
fn saved_files_pass_the_check_of_hugging_face() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (own, foreign) = (folder.path().join("own"), folder.path().join("foreign"));
    let layer = odd_layer(DType::BF16)?;
    layer.save(&own)?;
    layer.save_layout(Layout::Own, "model.layers.0.self_attn", &foreign)?;
    for bytes in [fs::read(own)?, fs::read(foreign)?, layer.to_bytes()?] {
        let (header_len, header) = SafeTensors::read_metadata(&bytes)?;
        let metadata = header.metadata().as_ref().expect("metadata");
        assert_eq!(metadata.get("format").map(String::as_str), Some("pt"));
        // The data of each tensor is aligned to the size of its numbers.
        assert_eq!((8 + header_len) % 8, 0);
    }
    Ok(())
}

/// A reader gets a complete file while others save.
#[test]
fn file_is_whole_at_any_time() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer.safetensors");
    let layers = [odd_layer(DType::F32)?, odd_layer(DType::F64)?];
    layers[0].save(&path)?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let save_often = |layer: &SelfAttention| (0..30).try_for_each(|_| layer.save(&path));
        let savers = layers.iter().map(|layer| scope.spawn(move || save_often(layer)));
        let savers: Vec<_> = savers.collect();
        while savers.iter().any(|saver| !saver.is_finished()) {
            SelfAttention::load(&path, &Device::Cpu)?;
        }
        for saver in savers {
            saver.join().expect("no panic")?;
        }
        Ok(())
    })?;
    assert_eq!(names(folder.path())?, ["layer.safetensors"]);
    Ok(())
}

#[test]
fn path_without_a_name_is_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let layer = odd_layer(DType::F32)?;
    assert!(layer.save("").is_err());
    assert!(layer.save("/").is_err());
    assert!(layer.save(folder.path().join("..")).is_err());
    Ok(())
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

    use super::*;

    fn mode(path: &Path) -> std::io::Result<u32> {
        Ok(fs::metadata(path)?.permissions().mode() & 0o777)
    }

    #[test]
    fn saving_over_a_file_keeps_its_permissions() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("layer.safetensors");
        let layer = odd_layer(DType::F32)?;
        layer.save(&file)?;
        for wanted in [0o600, 0o640] {
            fs::set_permissions(&file, fs::Permissions::from_mode(wanted))?;
            layer.save(&file)?;
            assert_eq!(mode(&file)?, wanted);
        }
        Ok(())
    }

    /// The permissions are 0666 without those of the umask, as for any other new file, and not 0600 as for a temporary
    /// file.
    #[test]
    fn saved_file_has_ordinary_permissions() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let (ordinary, saved) = (folder.path().join("ordinary"), folder.path().join("saved"));
        fs::write(&ordinary, "")?;
        odd_layer(DType::F32)?.save(&saved)?;
        assert_eq!(format!("{:o}", mode(&saved)?), format!("{:o}", mode(&ordinary)?));
        Ok(())
    }

    #[test]
    fn save_through_a_link_keeps_the_link() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let (target, link) = (folder.path().join("step-100"), folder.path().join("latest"));
        let layer = odd_layer(DType::F32)?;
        fs::write(&target, "earlier")?;
        symlink("step-100", &link)?;
        layer.save(&link)?;
        assert_eq!(fs::read_link(&link)?, Path::new("step-100"));
        assert_eq!(fs::read(&target)?, layer.to_bytes()?);
        assert!(fs::symlink_metadata(&target)?.is_file());
        assert_eq!(names(folder.path())?, ["latest", "step-100"]);
        Ok(())
    }

    /// A link to a file that doesn't exist yet is followed, as by any other program that writes through it.
    #[test]
    fn save_through_a_dangling_link_makes_its_target() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let link = folder.path().join("latest");
        symlink("step-100", &link)?;
        let layer = odd_layer(DType::F32)?;
        layer.save(&link)?;
        assert_eq!(fs::read_link(&link).ok().as_deref(), Some(Path::new("step-100")), "the link");
        assert_eq!(fs::read(folder.path().join("step-100"))?, layer.to_bytes()?);
        Ok(())
    }

    #[test]
    fn link_that_leads_to_itself_is_refused_and_kept() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        for (link, target) in [("itself", "itself"), ("a", "b"), ("b", "a")] {
            symlink(target, folder.path().join(link))?;
        }
        for link in ["itself", "a"] {
            assert_save_fails(&odd_layer(DType::F32)?, &folder.path().join(link));
            assert!(fs::read_link(folder.path().join(link)).is_ok(), "the link is gone");
        }
        assert_eq!(names(folder.path())?, ["a", "b", "itself"]);
        Ok(())
    }

    #[test]
    fn unwritable_folder_is_left_as_it_is() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("layer.safetensors");
        fs::write(&path, "earlier")?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555))?;
        if fs::write(folder.path().join("probe"), "").is_ok() {
            println!("skipped: this user may write to any folder");
            return Ok(());
        }
        let result = odd_layer(DType::F32)?.save(&path);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        assert_error_says(result, &["layer.safetensors", "can't write", "denied"]);
        assert_eq!(fs::read(&path)?, b"earlier");
        assert_eq!(names(folder.path())?, ["layer.safetensors"]);
        Ok(())
    }

    /// The variable that tells a test that it runs as a child process, and where to save.
    const SAVE_TO: &str = "CANDLE_ATTENTION_TEST_SAVE_TO";

    /// Runs one test of this file again as a child process in `folder`, from a shell that first runs `prelude`.
    fn run_again(test: &str, folder: &Path, prelude: &str, save_to: &Path) -> anyhow::Result<()> {
        let output = Command::new("sh")
            .args(["-c", &format!("{prelude} exec \"$0\" \"$@\"")])
            .arg(std::env::current_exe()?)
            .args(["--exact", &format!("own::saving::unix::{test}")])
            .current_dir(folder)
            .env(SAVE_TO, save_to)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        Ok(())
    }

    #[test]
    fn name_alone_is_a_file_of_the_current_folder() -> anyhow::Result<()> {
        if let Some(path) = std::env::var_os(SAVE_TO) {
            return Ok(odd_layer(DType::F32)?.save(path)?);
        }
        let folder = tempfile::tempdir()?;
        let test = "name_alone_is_a_file_of_the_current_folder";
        run_again(test, folder.path(), "", Path::new("layer.safetensors"))?;
        assert_eq!(names(folder.path())?, ["layer.safetensors"]);
        SelfAttention::load(folder.path().join("layer.safetensors"), &Device::Cpu)?;
        Ok(())
    }

    /// The shell limits the size of files, so that a write fails halfway as on a full disk.
    #[test]
    fn disk_that_is_full_halfway_leaves_the_earlier_file() -> anyhow::Result<()> {
        let layer = odd_layer(DType::F32)?;
        if let Some(path) = std::env::var_os(SAVE_TO) {
            assert_error_says(layer.save(&path), &["layer.safetensors", "can't write"]);
            // Only the limit stopped it: a file below the limit can be written there.
            fs::write(Path::new(&path).with_file_name("small"), [0; 100])?;
            return Ok(());
        }
        assert!(layer.to_bytes()?.len() > 2048, "more than the limit of one block");
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("layer.safetensors");
        // An earlier file, which holds another layer.
        randomise(&layer, 3)?;
        layer.save(&path)?;
        let earlier = fs::read(&path)?;
        let test = "disk_that_is_full_halfway_leaves_the_earlier_file";
        run_again(test, folder.path(), "trap '' XFSZ; ulimit -f 1;", &path)?;
        assert_eq!(names(folder.path())?, ["layer.safetensors", "small"]);
        assert!(fs::read(&path)? == earlier, "the earlier file has changed");
        SelfAttention::load(&path, &Device::Cpu)?;
        Ok(())
    }
}
