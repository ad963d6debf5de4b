//! Reads which file uses which.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;

/// A source file.
pub(crate) struct Source {
    /// Its path below `src`.
    pub(crate) path: String,
    /// The module that it is.
    module: Vec<String>,
    /// The modules and items that it names, from the crate's root.
    names: Vec<Vec<String>>,
}

/// A file that uses another, both by their index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrow {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl Source {
    pub(crate) fn parse(path: &str, text: &str) -> Result<Self> {
        let mut module: Vec<String> = path.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
        if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
            module.pop();
        }
        let file = syn::parse_file(text).with_context(|| path.to_owned())?;
        let child = |item: &syn::Item| match item {
            syn::Item::Mod(item) if item.content.is_none() => Some(item.ident.to_string()),
            _ => None,
        };
        let mut reader =
            Reader { children: file.items.iter().filter_map(child).collect(), module, names: Vec::new() };
        for item in file.items.iter().filter(|item| !is_test(item)) {
            reader.collect(item.to_token_stream());
        }
        Ok(Self { path: path.to_owned(), module: reader.module, names: reader.names })
    }

    /// Whether it is the crate's root, which declares the rooms and re-exports from them.
    pub(crate) fn is_root(&self) -> bool {
        self.module.is_empty()
    }

    /// Whether it is this module, written with `::`, or lies in it.
    pub(crate) fn is_in(&self, module: &str) -> bool {
        let mut own = self.module.iter();
        module.split("::").all(|part| own.next().is_some_and(|name| name == part))
    }
}

/// Reads all source files below a folder, sorted by path. Binaries are not part of the library.
pub(crate) fn read(folder: &Path) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).with_context(|| next.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let source = |path: &PathBuf| {
        let name = path.strip_prefix(folder)?.display().to_string();
        Source::parse(&name, &fs::read_to_string(path)?)
    };
    let is_program = |path: &&PathBuf| path.ends_with("main.rs") || path.starts_with(folder.join("bin"));
    files.iter().filter(|path| !is_program(path)).map(source).collect()
}

/// All arrows between different files.
pub(crate) fn of(sources: &[Source]) -> Vec<Arrow> {
    let mut arrows = Vec::new();
    for (from, source) in sources.iter().enumerate() {
        for name in &source.names {
            // The file that a name lies in is the longest module that it begins with.
            let holds = |(_, other): &(usize, &Source)| name.starts_with(&other.module) && !other.is_root();
            let to = sources.iter().enumerate().filter(holds).max_by_key(|(_, other)| other.module.len());
            arrows.extend(to.map(|(to, _)| Arrow { from, to }).filter(|arrow| arrow.from != arrow.to));
        }
    }
    arrows.sort_unstable();
    arrows.dedup();
    arrows
}

fn is_test(item: &syn::Item) -> bool {
    let attributes = match item {
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => return false,
    };
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg") && attribute.to_token_stream().to_string().contains("test")
    })
}

/// Whether `::` comes right before a token.
fn is_joined(tokens: &[TokenTree], at: usize) -> bool {
    let is_colon = |at: Option<usize>| {
        let token = at.and_then(|at| tokens.get(at));
        matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == ':')
    };
    is_colon(at.checked_sub(1)) && is_colon(at.checked_sub(2))
}

/// Reads one file.
struct Reader {
    /// The module that the file is.
    module: Vec<String>,
    /// The modules that it declares: paths may begin with them.
    children: Vec<String>,
    names: Vec<Vec<String>>,
}

impl Reader {
    /// Collects the paths from the root in a token stream.
    fn collect(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Ident(ident) if !is_joined(&tokens, at) => {
                    let start = self.start(&ident.to_string());
                    at += 1;
                    if let Some(start) = start.filter(|_| is_joined(&tokens, at + 2)) {
                        at = self.path(&tokens, at, start);
                    }
                }
                TokenTree::Group(group) => {
                    self.collect(group.stream());
                    at += 1;
                }
                _ => at += 1,
            }
        }
    }

    /// What a path begins with, from the crate's root, if it begins so.
    fn start(&self, word: &str) -> Option<Vec<String>> {
        match word {
            "crate" => Some(Vec::new()),
            "self" => Some(self.module.clone()),
            "super" => Some(self.module[..self.module.len().saturating_sub(1)].to_vec()),
            child if self.children.iter().any(|name| name == child) => {
                Some([&self.module[..], &[child.to_owned()]].concat())
            }
            _ => None,
        }
    }

    /// Follows a path from a `::` on; returns where it ends.
    fn path(&mut self, tokens: &[TokenTree], mut at: usize, mut name: Vec<String>) -> usize {
        while is_joined(tokens, at + 2) {
            match tokens.get(at + 2) {
                Some(TokenTree::Ident(ident)) if *ident == "super" => _ = name.pop(),
                Some(TokenTree::Ident(ident)) => name.push(ident.to_string()),
                Some(TokenTree::Group(group)) => {
                    self.tree(group.stream(), &name);
                    return at + 3;
                }
                _ => break,
            }
            at += 3;
        }
        self.names.push(name);
        at
    }

    /// The branches of a `use` tree.
    fn tree(&mut self, tokens: TokenStream, name: &[String]) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let is_comma = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',');
        for branch in tokens.split(is_comma) {
            match branch.first() {
                Some(TokenTree::Ident(ident)) if *ident == "self" => self.names.push(name.to_vec()),
                Some(TokenTree::Ident(ident)) => {
                    self.path(branch, 1, [name, &[ident.to_string()]].concat());
                }
                Some(_) => self.names.push(name.to_vec()),
                None => {}
            }
        }
    }
}
