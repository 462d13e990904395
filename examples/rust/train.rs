//! Trains an artifact on images in memory, all of them in each step, and saves it as a run folder.
//!
//!     rustc train.rs -l edge_bcs
//!     ./train out/board images.u8 labels.u8 20 out/run
//!
//! images.u8 holds the bytes of images [N, C, H, W], labels.u8 a byte for each. The declarations are those of edge_bcs.h that are
//! needed here.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::{env, fs, mem, process, ptr};

const ABI_VERSION: u32 = 1;

#[repr(C)]
struct Batch {
    size: u32,
    reserved: u32,
    count: u64,
    bytes: *const u8,
    floats: *const f32,
    labels: *const i64,
    read: Option<extern "C" fn(*mut c_void, u64, u64, *mut f32, *mut i64) -> c_int>,
    user: *mut c_void,
    weights: *const f64,
}

#[repr(C)]
#[derive(Default)]
struct StepResult {
    size: u32,
    reserved: u32,
    step: u64,
    labelled: u64,
    loss: f64,
    accuracy: f64,
    robust_accuracy: f64,
}

#[repr(C)]
struct Handle {
    _opaque: [u8; 0],
}

extern "C" {
    fn edge_bcs_abi_version() -> u32;
    fn edge_bcs_last_error() -> *const c_char;
    fn edge_bcs_open(folder: *const c_char, options: *const c_void, opened: *mut *mut Handle) -> c_int;
    fn edge_bcs_close(network: *mut Handle);
    fn edge_bcs_step(network: *mut Handle, batch: *const Batch, result: *mut StepResult) -> c_int;
    fn edge_bcs_save_into(network: *mut Handle, folder: *const c_char) -> c_int;
    fn edge_bcs_save(network: *mut Handle, bytes: *mut u64) -> c_int;
}

/// What a call that returned `status` means.
fn checked(status: c_int) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    // The library's own text, which lives until the next call of this thread that fails.
    Err(unsafe { CStr::from_ptr(edge_bcs_last_error()) }.to_string_lossy().into_owned())
}

fn text_of(word: &str) -> Result<CString, String> {
    CString::new(word).map_err(|error| error.to_string())
}

/// An open network, closed when it is dropped.
struct Network(*mut Handle);

impl Network {
    fn open(folder: &str) -> Result<Self, String> {
        let mut handle = ptr::null_mut();
        checked(unsafe { edge_bcs_open(text_of(folder)?.as_ptr(), ptr::null(), &mut handle) })?;
        Ok(Network(handle))
    }

    /// One step on bytes of images and their labels.
    fn step(&mut self, images: &[u8], labels: &[i64]) -> Result<StepResult, String> {
        let batch = Batch {
            size: mem::size_of::<Batch>() as u32,
            reserved: 0,
            count: labels.len() as u64,
            bytes: images.as_ptr(),
            floats: ptr::null(),
            labels: labels.as_ptr(),
            read: None,
            user: ptr::null_mut(),
            weights: ptr::null(),
        };
        let mut result = StepResult { size: mem::size_of::<StepResult>() as u32, ..Default::default() };
        checked(unsafe { edge_bcs_step(self.0, &batch, &mut result) })?;
        Ok(result)
    }

    fn save_into(&mut self, folder: &str) -> Result<(), String> {
        checked(unsafe { edge_bcs_save_into(self.0, text_of(folder)?.as_ptr()) })
    }

    fn save(&mut self) -> Result<(), String> {
        checked(unsafe { edge_bcs_save(self.0, ptr::null_mut()) })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        unsafe { edge_bcs_close(self.0) }
    }
}

fn run(words: &[String]) -> Result<(), String> {
    let [artifact, images, labels, steps, folder] = words else {
        return Err("usage: train ARTIFACT IMAGES LABELS STEPS RUN".into());
    };
    if unsafe { edge_bcs_abi_version() } != ABI_VERSION {
        return Err("this library has another interface".into());
    }
    let read = |path: &String| fs::read(path).map_err(|error| format!("{path}: {error}"));
    let images = read(images)?;
    let labels: Vec<i64> = read(labels)?.into_iter().map(i64::from).collect();
    let steps: u64 = steps.parse().map_err(|_| "STEPS is a number".to_string())?;
    let mut network = Network::open(artifact)?;
    network.save_into(folder)?;
    for _ in 0..steps {
        let result = network.step(&images, &labels)?;
        println!("step {} loss {:?}", result.step, result.loss);
    }
    network.save()
}

fn main() {
    let words: Vec<String> = env::args().skip(1).collect();
    if let Err(sentence) = run(&words) {
        eprintln!("{sentence}");
        process::exit(1);
    }
}
