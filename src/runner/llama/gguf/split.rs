//! Models that are split into several GGUF files. All files of a model are checked together, before llama.cpp reads
//! them.
//!
//! llama.cpp derives the names of the other files from the name of the first one, and from the number of files in its
//! metadata.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{Header, SPLIT_COUNT_KEY, SPLIT_INDEX_KEY, check_magic};
use crate::gguf_name::SplitPart;

/// Checks that all files of a model exist and start like GGUF files. `path` is the path of the first file.
///
/// # Errors
/// A file cannot be read or is not a GGUF file, or `path` does not name the first file.
pub(in super::super) fn check_files(path: &Path) -> Result<(), String> {
    for file in files(path)? {
        check_magic(&file).map_err(|problem| in_file(path, &file, problem))?;
    }
    Ok(())
}

/// Reads the headers of all files of a model, and checks their structure. Returns the header of the first file, with
/// the tensors of all files.
///
/// # Errors
/// A file is missing or damaged, or does not belong to the others.
pub(in super::super) fn read_header(path: &Path) -> Result<Header, String> {
    let files = files(path)?;
    let mut first: Option<Header> = None;
    for (index, file) in (0..).zip(&files) {
        let problem = |problem| in_file(path, file, problem);
        let header = Header::read(file).map_err(problem)?;
        check_position(&header, index, files.len()).map_err(problem)?;
        match &mut first {
            None => first = Some(header),
            Some(first) => first.tensors.extend(header.tensors),
        }
    }
    let header = first.ok_or_else(|| "the model has no files".to_owned())?;
    if header.tensors.is_empty() {
        return Err("the model has no tensors".to_owned());
    }
    let mut names = HashSet::new();
    match header
        .tensors
        .iter()
        .find(|tensor| !names.insert(&tensor.name))
    {
        None => Ok(header),
        Some(tensor) => Err(format!("tensor `{}` is in the model twice", tensor.name)),
    }
}

/// Returns the paths of a model's files: one file, or all files of a split model in their order.
fn files(path: &Path) -> Result<Vec<PathBuf>, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some(part) = SplitPart::parse(&name) else {
        return Ok(vec![path.to_owned()]);
    };
    let mut names = part.all();
    if part.number > 1 {
        let (number, count) = (part.number, part.count);
        let first = names.next().unwrap_or_default();
        return Err(format!(
            "this is file {number} of {count} of a split model; set the model path to the first file, {first}"
        ));
    }
    Ok(names.map(|name| path.with_file_name(name)).collect())
}

/// Adds the file's name to a problem, unless it is the file `path` that the user has named.
fn in_file(path: &Path, file: &Path, problem: String) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    match path == file {
        true => problem,
        false => format!("in {name}, another file of this split model: {problem}"),
    }
}

/// Checks the position of a file in its model. `count` is the number of files according to their names.
fn check_position(header: &Header, index: usize, count: usize) -> Result<(), String> {
    let number = |key| header.integer(key).map(|it| it.unwrap_or_default());
    let (found_index, found_count) = (number(SPLIT_INDEX_KEY)?, number(SPLIT_COUNT_KEY)?);
    let found_count = found_count.max(1);
    if i128::try_from(count) != Ok(found_count) {
        return Err(format!(
            "`{SPLIT_COUNT_KEY}` is {found_count}, but the file's name stands for a model of {count}; give each file its \
             original name, such as model-00001-of-00002.gguf"
        ));
    }
    if i128::try_from(index) != Ok(found_index) {
        return Err(format!(
            "`{SPLIT_INDEX_KEY}` must be {index} for this name (got {found_index})"
        ));
    }
    Ok(())
}
