use super::*;
use crate::cuda::Limits;
use crate::cuda::plan::{Element, Parts, Pass, Variant};

/// Limits of the GPUs that the kernels are for.
const MACHINES: [Limits; 3] = [
    Limits { capability: (8, 0), shared_bytes: 163 << 10, multiprocessors: 108 },
    Limits { capability: (8, 6), shared_bytes: 99 << 10, multiprocessors: 84 },
    Limits { capability: (9, 0), shared_bytes: 227 << 10, multiprocessors: 132 },
];

fn program(source: Source, variant: Variant, pass: Option<Pass>, limits: Limits) -> Program {
    let defines = match pass {
        Some(pass) => {
            variant.defines(variant.tiles(pass, limits).unwrap(), (pass == Pass::Keys).then_some(Parts::Both))
        }
        None => variant.careful_defines(),
    };
    let hopper = variant.hopper && pass.is_some_and(|pass| pass != Pass::Decode);
    Program { source, defines, hopper, capability: limits.capability }
}

/// The other variants are compiled by the tests of candle-attention.
#[test]
fn every_source_compiles_for_every_machine() {
    for (limits, plain) in MACHINES.into_iter().zip([true, false, false]) {
        let variant = Variant::new(Element::Bf16, [64, 64], plain, limits).unwrap();
        let sources = [
            (Source::Forward, Some(Pass::Forward)),
            (Source::Decode, Some(Pass::Decode)),
            (Source::Backward, Some(Pass::Keys)),
            (Source::Bias, Some(Pass::Queries)),
            (Source::Careful, None),
        ];
        for (source, pass) in sources {
            let code = program(source, variant, pass, limits).compile("test").unwrap();
            assert!(code.starts_with(b"\x7fELF"), "{source:?}, {variant:?}");
        }
    }
}

#[test]
fn a_mistake_is_an_error_with_the_compilers_words() {
    let variant = Variant::new(Element::Bf16, [64, 64], false, MACHINES[0]).unwrap();
    let mut program = program(Source::Forward, variant, Some(Pass::Forward), MACHINES[0]);
    *program.defines.iter_mut().find(|(name, _)| *name == "WARPS").unwrap() = ("WARPS", 3);
    let error = program.compile("attention_forward").unwrap_err().to_string();
    assert!(error.contains("attention_forward") && error.contains("error"), "{error}");
    program.capability = (1, 0);
    assert!(program.compile("attention_forward").is_err());
}

#[test]
fn a_broken_file_is_none() {
    let folder = std::env::temp_dir().join(format!("attention-kernels-{}", process::id()));
    let file = folder.join("forward.cubin");
    write(&file, b"machine code").unwrap();
    assert_eq!(read(&file).unwrap(), b"machine code");
    let whole = fs::read(&file).unwrap();
    for broken in [&whole[..whole.len() - 1], &whole[..10], b"", b"another file", &[&whole[..], b"x"].concat()] {
        fs::write(&file, broken).unwrap();
        assert_eq!(read(&file), None);
    }
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(read(&file), None);
    // A folder that can't be made.
    assert!(write(Path::new("/dev/null/folder/forward.cubin"), b"machine code").is_err());
}

#[test]
fn the_name_of_a_file_depends_on_everything() {
    let of = |element, plain, machine: usize| {
        let variant = Variant::new(element, [64, 64], plain, MACHINES[machine]).unwrap();
        program(Source::Forward, variant, Some(Pass::Forward), MACHINES[machine]).file_name()
    };
    let names = [
        of(Element::Bf16, false, 0),
        of(Element::F16, false, 0),
        of(Element::Bf16, true, 0),
        of(Element::Bf16, false, 1),
        of(Element::Bf16, false, 2),
    ];
    let distinct: std::collections::HashSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "{names:?}");
    assert_eq!(of(Element::Bf16, false, 0), names[0]);
}
