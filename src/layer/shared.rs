//! The methods that both layers share: parameters and files.

/// Implements the shared methods for a layer, which is a tuple struct around a [`Core`](crate::layer::core::Core).
macro_rules! shared_methods {
    ($Layer:ident) => {
        impl $Layer {
            /// Loads a layer that [`save`](Self::save) wrote. Its parameters are variables, so that training can
            /// continue (see [`vars`](Self::vars)).
            ///
            /// # Errors
            ///
            /// A file that can't be read, isn't safetensors, holds no config or another kind of layer, or holds other
            /// tensors than those of its config. The error names all missing and unexpected tensors, those of a wrong
            /// shape or dtype, and those that hold NaN or infinity.
            pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
                let path = path.as_ref();
                Self::from_bytes(&attention_files::read(path)?, device).map_err(|error| error.at(path))
            }

            /// As [`load`](Self::load), from the bytes of a file.
            ///
            /// # Errors
            ///
            /// As [`load`](Self::load).
            pub fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self> {
                let (config, parameters, dtype) = checkpoint::from_bytes(bytes, Self::KIND, device)?;
                init::check(Self::KIND, &config, dtype)?;
                Ok(Self(Core::from_parameters(Self::KIND, &config, parameters, "")?))
            }

            /// A layer from weights that another program trained. The prefix of `vb` is the name of the attention in
            /// the model, and `vb` holds the tensors that `layout` names. The parameters get the dtype of `vb`. The
            /// config gives what a checkpoint doesn't contain: heads, scale, rotary embedding, masks.
            ///
            /// If `vb` holds variables (a `VarMap`), the parameters are variables too, with copies of the values. If it
            /// doesn't (a file), they are constants: inference then records no graph. [`trainable`](Self::trainable)
            /// makes them variables.
            ///
            /// # Errors
            ///
            /// An invalid config, or one with parameters that the layout has no name for; tensors that `vb` lacks,
            /// holds in another shape, or holds although the config doesn't have them; weights that aren't f16, bf16,
            /// f32 or f64, are NaN or infinite, or become so in the dtype of `vb`; variables of another dtype or device
            /// than those of `vb`. One error names all of them.
            ///
            /// A `VarBuilder` casts what it holds. If candle reads the file, weights of eight bits without a scale and
            /// integers from 0 to 255 can't be told from other floats. [`load_layout`](Self::load_layout) and
            /// [`checkpoint::var_builder`] know every dtype.
            pub fn from_layout(layout: Layout, config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
                init::check(Self::KIND, config, vb.dtype())?;
                let parameters = checkpoint::from_var_builder(checkpoint::Plan::of_attention(layout, config)?, &vb)?;
                Ok(Self(Core::from_parameters(Self::KIND, config, parameters, &vb.prefix())?))
            }

            /// As [`from_layout`](Self::from_layout), from a [`LayoutFile`] on disk. Its parameters are variables. Only
            /// the tensors under the file's prefix are read.
            ///
            /// # Errors
            ///
            /// As [`from_layout`](Self::from_layout), and: a checkpoint that can't be read or lacks a shard; tensors of
            /// several dtypes if the file names none; tensors under the prefix that the layout doesn't know. One error
            /// names all wrong tensors.
            pub fn load_layout(config: &SelfAttentionConfig, file: &LayoutFile) -> Result<Self> {
                init::check(Self::KIND, config, file.dtype.unwrap_or(DType::F32))?;
                let parameters = checkpoint::from_file(file, checkpoint::Plan::of_attention(file.layout, config)?)?;
                Ok(Self(Core::from_parameters(Self::KIND, config, parameters, &file.prefix)?))
            }

            /// A copy of the layer in which every parameter is a new variable, to train a layer that was loaded as
            /// constants.
            ///
            /// # Errors
            ///
            /// A layer with weights in blocks, or with adapters that aren't merged; too little memory on the device.
            pub fn trainable(&self) -> Result<Self> {
                Ok(Self(self.0.trainable()?))
            }

            /// This rank's part of the layer, which all ranks share (tensor parallelism): the query heads r·H/n to (r + 1)·H/n of rank r
            /// of n, and the key heads that they use. All ranks call it with the same layer. The part has copies of its parameters, each a
            /// variable if it was one, so that the whole layer can be dropped.
            ///
            /// All ranks call the part's methods with the same input and options, and get the same output, which is that of the whole
            /// layer but for rounding. Masks, biases and seeds are those of the whole layer. Weights, scores and log-sum-exp are those of
            /// this rank's heads. Every gradient is that of the whole layer, or of this rank's part of it, if all ranks make the
            /// same backward pass. See [`TransformerBlock::shard`](crate::block::TransformerBlock::shard) for an example, and docs/parallel.md.
            ///
            /// # Errors
            ///
            /// On every rank: heads that the ranks can't divide; key heads that neither they divide nor that divide them; a layer without
            /// W_O, that is a part already, with weights in blocks, or with adapters that aren't merged; ranks with other configs or
            /// parameters; a rank that is gone. The methods of the part return
            /// [`AttentionError::Ranks`](crate::AttentionError::Ranks) on every rank if the ranks call them with other inputs or options.
            pub fn shard(&self, communicator: &Arc<dyn Communicator>) -> Result<Self> {
                Ok(Self(self.0.shard(communicator)?))
            }

            /// The whole layer from its parts, on every rank; a clone of a layer that is no part. All ranks call it. Files and layouts hold whole
            /// layers: gather a part before it is saved.
            ///
            /// # Errors
            ///
            /// A rank that is gone; too little memory.
            pub fn gather(&self) -> Result<Self> {
                Ok(Self(self.0.gather()?))
            }

            /// The config of the layer; that of the whole layer for a [part](Self::shard).
            pub fn config(&self) -> &SelfAttentionConfig {
                self.0.whole_config()
            }

            /// W_Q: embed_dim -> num_heads · head_dim.
            pub fn q_proj(&self) -> &Linear {
                self.0.q_proj.linear()
            }

            /// W_K: kv_dim -> num_kv_heads · head_dim.
            pub fn k_proj(&self) -> &Linear {
                self.0.k_proj.linear()
            }

            /// W_V: value_input_dim -> num_kv_heads · value_dim.
            pub fn v_proj(&self) -> &Linear {
                self.0.v_proj.linear()
            }

            /// W_O: num_heads · value_dim -> embed_dim.
            pub fn o_proj(&self) -> Option<&Linear> {
                self.0.o_proj.as_ref().map(Projection::linear)
            }

            /// Every parameter with its name, always in the same order.
            pub fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
                self.0.parameters()
            }

            /// The parameters that an optimiser can train, always in the same order. These are all parameters of a
            /// layer that was loaded or built on a `VarMap`, and none of one built on a read-only `VarBuilder`. With
            /// [adapters](crate::adapter) they are those of the active one alone.
            pub fn vars(&self) -> Vec<Var> {
                let own = self.0.parameters().into_iter().map(|(_, tensor)| tensor);
                let tensors = own.chain(self.0.active_tensors());
                tensors.filter(|tensor| tensor.is_variable()).filter_map(|x| Var::from_tensor(x).ok()).collect()
            }

            /// How many training passes have used dropout so far. Each pass drops other weights. To continue a training
            /// run, restore the count with [`set_dropout_calls`](Self::set_dropout_calls).
            pub fn dropout_calls(&self) -> u64 {
                self.0.dropout_calls.load(Ordering::Relaxed)
            }

            /// Sets [`dropout_calls`](Self::dropout_calls). Clones of this layer share the count.
            pub fn set_dropout_calls(&self, calls: u64) {
                self.0.dropout_calls.store(calls, Ordering::Relaxed);
            }

            /// Saves parameters and config to a safetensors file. The file is replaced as a whole or not at all. Its
            /// metadata has `format: pt`, which Hugging Face's programs ask for.
            ///
            /// # Errors
            ///
            /// A folder that can't be written to, or a full disk; parameters that are NaN or infinite, since no layer
            /// could load them; a part of a layer, a rotary embedding from tables, weights in blocks, or adapters that aren't merged,
            /// which a file doesn't hold. An earlier file is then unchanged.
            pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
                Ok(attention_files::write(path.as_ref(), &self.to_bytes()?)?)
            }

            /// The bytes of the file that [`save`](Self::save) writes.
            ///
            /// # Errors
            ///
            /// Parameters that can't be copied from their device, or that are NaN or infinite; a part of a layer, a rotary
            /// embedding from tables, weights in blocks, or adapters that aren't merged, which a file doesn't hold.
            pub fn to_bytes(&self) -> Result<Vec<u8>> {
                checkpoint::to_bytes(&self.0.header()?, self.0.parameters())
            }

            /// The parameters as another program names and arranges them, without a prefix, in the layer's dtype. They
            /// are copies.
            ///
            /// # Errors
            ///
            /// A part of a layer, one with weights in blocks or adapters that aren't merged, or parameters that the layout has no name for.
            pub fn to_layout(&self, layout: Layout) -> Result<Vec<(String, Tensor)>> {
                self.0.check_plain()?;
                checkpoint::to_tensors(&checkpoint::Plan::of_attention(layout, &self.0.config)?, &self.0.parameters())
            }

            /// Saves the tensors of [`to_layout`](Self::to_layout) as a safetensors file. Each name is preceded by
            /// `prefix` and a dot, unless the prefix is empty. The file is replaced as a whole or not at all.
            ///
            /// # Errors
            ///
            /// As [`to_layout`](Self::to_layout) and [`save`](Self::save).
            pub fn save_layout(&self, layout: Layout, prefix: &str, path: impl AsRef<Path>) -> Result<()> {
                let bytes = checkpoint::to_file(&self.to_layout(layout)?, prefix)?;
                Ok(attention_files::write(path.as_ref(), &bytes)?)
            }
        }

        impl Projections for $Layer {
            fn projections(&self) -> Vec<(String, &Projection)> {
                self.0.projections()
            }

            fn map_projections(&self, change: &mut Change) -> Result<Self> {
                Ok(Self(self.0.map_projections(change)?))
            }

            fn frozen(&self) -> Self {
                Self(self.0.frozen())
            }
        }
    };
}
pub(super) use shared_methods;
