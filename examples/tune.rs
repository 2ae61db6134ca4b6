use candle_attention::*;
use candle_core::*;
use std::time::Instant;
struct G(Tensor);
impl CustomOp1 for G {
    fn name(&self) -> &'static str {
        "g"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
fn med(mut t: Vec<f64>) -> f64 {
    t.sort_by(|a, b| a.total_cmp(b));
    t[t.len() / 2]
}
fn time(ms: u128, mut f: impl FnMut()) -> f64 {
    f();
    let mut t = vec![];
    let s = Instant::now();
    while s.elapsed().as_millis() < ms || t.len() < 3 {
        let s = Instant::now();
        f();
        t.push(s.elapsed().as_secs_f64());
    }
    med(t)
}
fn main() {
    let a: Vec<String> = std::env::args().skip(1).collect();
    let what = a.get(0).map(|x| x.as_str()).unwrap_or("f");
    let shapes = [
        (1, 8, 512, 512, 64),
        (1, 8, 2048, 2048, 64),
        (8, 12, 128, 128, 64),
        (1, 16, 1024, 1024, 128),
        (1, 4, 197, 197, 64),
        (1, 8, 512, 512, 80),
        (1, 8, 512, 512, 40),
        (1, 1, 2048, 2048, 64),
    ];
    let m = Tensor::randn(0f32, 1., (1536, 1536), &Device::Cpu).unwrap();
    let dec = [(1, 32, 32, 4096, 128), (1, 32, 8, 4096, 128), (1, 32, 32, 16384, 128), (1, 32, 8, 16384, 128)];
    let g = |s: (usize, usize, usize, usize)| Tensor::randn(0f32, 1., s, &Device::Cpu).unwrap();
    if what == "d" {
        for (b, h, kh, l, d) in dec {
            let (q, k, v) = (g((b, h, 1, d)), g((b, kh, l, d)), g((b, kh, l, d)));
            let o = AttentionOptions { backend: Backend::Fused, ..Default::default() };
            let t = time(300, || {
                scaled_dot_product_attention(&q, &k, &v, &o).unwrap();
            });
            println!("{h} {kh} {l}: {:.3} ms {:.1} GB/s", t * 1e3, (2 * b * kh * l * d * 4) as f64 / t / 1e9);
        }
        return;
    }
    let opt = a.get(1).map(|x| x.as_str()).unwrap_or("plain");
    for (b, h, l, _, d) in shapes {
        let only = a.get(2);
        if only.is_some_and(|o| *o != format!("{l}x{d}")) {
            continue;
        }
        for causal in [false, true] {
            let dt = match opt {
                "bf16" => DType::BF16,
                "f16" => DType::F16,
                _ => DType::F32,
            };
            let v: Vec<Var> =
                (0..3).map(|_| Var::from_tensor(&g((b, h, l, d)).to_dtype(dt).unwrap()).unwrap()).collect();
            let t: Vec<Tensor> = v.iter().map(|v| v.as_detached_tensor()).collect();
            let go = G(g((b, h, l, d)).to_dtype(dt).unwrap());
            let mut o = AttentionOptions {
                backend: Backend::Fused,
                attn_mask: if causal { Mask::causal() } else { Mask::full() },
                ..Default::default()
            };
            match opt {
                "bias" => o.attn_bias = Some(Tensor::randn(0f32, 1., (l, l), &Device::Cpu).unwrap()),
                "tbias" => {
                    o.attn_bias = Some(
                        Var::from_tensor(&Tensor::randn(0f32, 1., (l, l), &Device::Cpu).unwrap())
                            .unwrap()
                            .as_tensor()
                            .clone(),
                    )
                }
                "pad" => {
                    let p = Tensor::from_vec(
                        (0..b * l).map(|i| u8::from(i % l >= l * 3 / 4)).collect::<Vec<_>>(),
                        (b, l),
                        &Device::Cpu,
                    )
                    .unwrap();
                    o.attn_mask = o.attn_mask & Mask::from_padding_mask(&p).unwrap()
                }
                "drop" => {
                    o.dropout_p = 0.1;
                    o.dropout_seed = 3
                }
                "cap" => o.softcap = Some(30.0),
                _ => {}
            }
            let fl = (4 * b * h * d) as f64 * (if causal { (l * (l + 1) / 2) as f64 } else { (l * l) as f64 });
            let (mut tf, mut tb, mut tm) = (vec![], vec![], vec![]);
            for _ in 0..5 {
                tm.push(time(30, || {
                    m.matmul(&m).unwrap();
                }));
                if what != "b" {
                    tf.push(time(40, || {
                        scaled_dot_product_attention(&t[0], &t[1], &t[2], &o).unwrap();
                    }));
                }
                if what != "f" {
                    tb.push(time(60, || {
                        scaled_dot_product_attention(v[0].as_tensor(), v[1].as_tensor(), v[2].as_tensor(), &o)
                            .unwrap()
                            .context
                            .apply_op1(G(go.0.clone()))
                            .unwrap()
                            .backward()
                            .unwrap();
                    }));
                }
            }
            let pk = 2. * 1536f64.powi(3) / med(tm) / 1e9;
            print!("{b},{h},{l},{d} {}: sgemm {pk:.0}", if causal { "causal" } else { "full  " });
            if !tf.is_empty() {
                let t = med(tf);
                print!("  fwd {:.2} ms {:.0} GF {:.2}", t * 1e3, fl / t / 1e9, fl / t / 1e9 / pk);
            }
            if !tb.is_empty() {
                let t = med(tb);
                print!("  f+b {:.2} ms {:.0} GF {:.2}", t * 1e3, 3.5 * fl / t / 1e9, 3.5 * fl / t / 1e9 / pk);
            }
            println!();
        }
    }
}
