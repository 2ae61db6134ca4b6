//! Laws of `scaled_dot_product_attention`.

mod broadcast;
mod definition;
mod dropout;
mod dtypes;
mod empty;
mod empty_views;
mod equivalences;
mod extremes;
mod layout;
mod masking;
mod outputs;
mod scores;
mod setup;
