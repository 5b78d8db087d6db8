//! libFuzzer's way into [`fuzz::client_replies`]; built and run by `cargo lab fuzz`.

#![no_main]
#![allow(unsafe_code, reason = "the macro exports the function that libFuzzer's runtime calls")]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::client_replies(bytes));
