//! Rego rules compiled for the register machine, with every error made visible.
//!
//! The machine takes an error inside a rule for a rule that did not match, and two different values of
//! one rule for none; a key that an object gets twice keeps the last value. A `deny` that depends on any
//! of these would be skipped and the request allowed. So the program is rewritten after compiling:
//! built-ins and operators are called through guards that stop the evaluation, the definitions of a rule
//! become rules of their own whose values are compared, and before a key is set the guard sees what it
//! holds. What the machine would take silently (too many arguments, unbounded depth) is refused here.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroUsize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use regorus::languages::rego::compiler::Compiler;
use regorus::rvm::instructions::{
    ArrayCreateParams, BuiltinCallParams, FunctionCallParams, GuardMode, Instruction,
    LiteralOrRegister,
};
use regorus::rvm::program::{BuiltinInfo, RuleInfo, RuleType};
use regorus::rvm::vm::VmError;
use regorus::rvm::{Program, RegoVM};
use regorus::utils::limits::PolicyLengthConfig;
use regorus::{Engine, Value};

use crate::error::clip;
use crate::limits::{FILE_BYTES_MAX, REGO_FUEL, REGO_LINE_CHARACTERS_MAX, REGO_RULE_DEPTH_MAX};
use crate::rego_builtins::{OPERATORS, Stop, begin, guarded, stopped};
use crate::rego_source::{Finding, defined, findings, scan};

/// Registers of a machine's window.
const REGISTERS_MAX: u8 = u8::MAX;
/// Arguments that a call carries; the machine drops the others without a word.
const ARGUMENTS_MAX: usize = 8;

/// One policy file.
pub(crate) struct Module<'a> {
    pub(crate) path: &'a str,
    pub(crate) text: &'a str,
}

/// What keeps rules from being compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) file: String,
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl Fault {
    fn new(file: &str, line: usize, message: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            line,
            message: message.into(),
        }
    }

    /// The engine's message, without the picture of the source that it draws around it.
    fn read(error: &anyhow::Error, file: &str) -> Self {
        let text = format!("{error:#}");
        let mut at = (file.to_owned(), 1);
        let mut message = None;
        for line in text.lines().map(str::trim) {
            if let Some(place) = line.strip_prefix("--> ") {
                let mut parts = place.rsplitn(3, ':').skip(1);
                if let (Some(number), Some(name)) = (parts.next(), parts.next()) {
                    at = (name.to_owned(), number.parse().unwrap_or(1));
                }
            } else if let Some(said) = line.strip_prefix("error: ") {
                message = Some(said.to_owned());
            }
        }
        let message = message.unwrap_or_else(|| text.replace('\n', " "));
        Self::new(&at.0, at.1, clip(&message))
    }
}

/// Parses modules: the engine that holds them, with what they have that this node does not run.
pub(crate) fn parse(modules: &[Module<'_>]) -> Result<(Engine, Vec<(String, Finding)>), Fault> {
    let mut engine = Engine::new();
    engine.set_policy_length_config(PolicyLengthConfig {
        max_col: NonZeroU32::new(REGO_LINE_CHARACTERS_MAX).unwrap_or(NonZeroU32::MIN),
        max_file_bytes: NonZeroUsize::new(FILE_BYTES_MAX).unwrap_or(NonZeroUsize::MIN),
        ..PolicyLengthConfig::default()
    });
    for module in modules {
        scan(module.text).map_err(|(line, message)| Fault::new(module.path, line, message))?;
        engine
            .add_policy(module.path.to_owned(), module.text.to_owned())
            .map_err(|error| Fault::read(&error, module.path))?;
    }
    let parsed = engine.get_modules();
    let functions = defined(parsed.iter().map(AsRef::as_ref));
    let mut found = Vec::new();
    for module in parsed.iter() {
        let path = module.package.span.source.get_path();
        found.extend(
            findings(module, &functions)
                .into_iter()
                .map(|finding| (path.clone(), finding)),
        );
    }
    Ok((engine, found))
}

/// Compiled rules with one entry point. Immutable: each run has a machine of its own.
pub(crate) struct Rules {
    program: Arc<Program>,
    data: Value,
}

impl Rules {
    /// Compiles what the entry point needs.
    pub(crate) fn compile(modules: &[Module<'_>], data: Value, entry: &str) -> Result<Self, Fault> {
        let first = modules.first().map_or("policies", |module| module.path);
        let (mut engine, found) = parse(modules)?;
        if let Some((path, finding)) = found.into_iter().next() {
            let message = format!("`{}` is not allowed: {}", finding.name, finding.reason);
            return Err(Fault::new(&path, finding.line, message));
        }
        let failed = |error: &anyhow::Error| Fault::read(error, first);
        engine
            .add_data(data.clone())
            .map_err(|error| failed(&error))?;
        let policy = engine
            .compile_with_entrypoint(&entry.into())
            .map_err(|error| failed(&error))?;
        let program = Compiler::compile_from_policy(&policy, &[entry])
            .map_err(|error| failed(&anyhow::Error::new(error)))?;
        let mut program = Arc::unwrap_or_clone(program);
        Hardening::new(&mut program).run()?;
        let rules = Self {
            program: Arc::new(program),
            data,
        };
        rules
            .machine()
            .map_err(|error| Fault::new(first, 1, clip(&error.to_string())))?;
        Ok(rules)
    }

    fn machine(&self) -> Result<RegoVM, VmError> {
        let mut machine = RegoVM::new();
        machine.load_program(Arc::clone(&self.program));
        machine.set_data(self.data.clone())?;
        machine.set_max_instructions(REGO_FUEL);
        machine.set_strict_builtin_errors(true);
        Ok(machine)
    }

    /// Evaluates the entry point for an input. Nothing of an earlier run is left.
    pub(crate) fn run(&self, input: Value) -> Result<Value, Stop> {
        begin();
        // Functions of the engine can panic, for instance on an empty text to look for. The machine is
        // thrown away, so nothing half done is seen again.
        let said = catch_unwind(AssertUnwindSafe(|| {
            self.machine().and_then(|mut machine| {
                machine.set_input(input);
                machine.execute_entry_point_by_index(0)
            })
        }))
        .map_err(|_| Stop::Error("the engine panicked".to_owned()))?;
        // A guard's word first: what the machine says of it is only its dress.
        match (stopped(), said) {
            (Some(stop), _) => Err(stop),
            (None, Ok(value)) => Ok(value),
            (None, Err(VmError::InstructionLimitExceeded { limit, .. })) => {
                Err(Stop::Budget(format!("more than {limit} instructions")))
            }
            (None, Err(VmError::RegexSizeLimitExceeded { limit, .. })) => Err(Stop::Budget(
                format!("a pattern takes more than {limit} bytes"),
            )),
            (None, Err(error)) => Err(Stop::Error(clip(&error.to_string()))),
        }
    }
}

/// The rewriting of one program.
struct Hardening<'p> {
    program: &'p mut Program,
    operators: BTreeMap<&'static str, u16>,
    /// Where the code of each body begins, with its rule, in the order of the code.
    owners: Vec<(usize, usize)>,
    /// Instructions to stand before the one of a number.
    inserted: BTreeMap<usize, Vec<Instruction>>,
}

impl<'p> Hardening<'p> {
    fn new(program: &'p mut Program) -> Self {
        let mut owners: Vec<(usize, usize)> = Vec::new();
        for (rule, info) in program.rule_infos.iter().enumerate() {
            let bodies = info.definitions.iter().flatten().copied();
            let blocks = info.destructuring_blocks.iter().flatten().copied();
            owners.extend(
                bodies
                    .chain(blocks)
                    .filter_map(|begin| Some((usize::try_from(begin).ok()?, rule))),
            );
        }
        owners.sort_unstable();
        Self {
            program,
            operators: BTreeMap::new(),
            owners,
            inserted: BTreeMap::new(),
        }
    }

    fn run(mut self) -> Result<(), Fault> {
        self.depths()?;
        self.rewrite()?;
        self.relocate()?;
        self.split()?;
        self.resolve()?;
        let program = self.program;
        program
            .validate_limits()
            .map_err(|message| Fault::new("policies", 1, message))
    }

    fn fault(&self, at: usize, message: impl Into<String>) -> Fault {
        let span = self
            .program
            .instruction_spans
            .get(at)
            .and_then(Option::as_ref);
        let file = span.and_then(|span| span.get_source_name(&self.program.sources));
        Fault::new(
            file.unwrap_or("policies"),
            span.map_or(1, |span| span.line.max(1)),
            message,
        )
    }

    fn owner(&self, at: usize) -> Option<usize> {
        let before = self.owners.partition_point(|(begin, _)| *begin <= at);
        self.owners
            .get(before.checked_sub(1)?)
            .map(|(_, rule)| *rule)
    }

    /// Bounds how deep rules call rules: the machine calls itself for each, on a stack of fixed size.
    /// References that are made at run time count as references to all that they could mean.
    fn depths(&self) -> Result<(), Fault> {
        let mut calls: Vec<Vec<(usize, usize)>> = vec![Vec::new(); self.program.rule_infos.len()];
        for (at, instruction) in self.program.instructions.iter().enumerate() {
            let Some(rule) = self.owner(at) else { continue };
            let mut targets = Vec::new();
            match instruction {
                Instruction::CallRule { rule_index, .. } => targets.push(usize::from(*rule_index)),
                Instruction::FunctionCall { params_index } => {
                    let params = self
                        .program
                        .instruction_data
                        .get_function_call_params(*params_index)
                        .ok_or_else(|| self.fault(at, "a call without parameters"))?;
                    targets.push(usize::from(params.func_rule_index));
                }
                Instruction::VirtualDataDocumentLookup { params_index } => {
                    let params = self
                        .program
                        .instruction_data
                        .get_virtual_data_document_lookup_params(*params_index)
                        .ok_or_else(|| self.fault(at, "a lookup without parameters"))?;
                    if self.ends_on_a_package(&params.path_components) {
                        return Err(self.fault(
                            at,
                            "a package read as a document: the engine shows rules in it that are undefined; \
                             name the rule",
                        ));
                    }
                    self.reachable(&params.path_components, &mut targets);
                }
                _ => {}
            }
            if let Some(calls) = calls.get_mut(rule) {
                calls.extend(targets.into_iter().map(|target| (target, at)));
            }
        }
        let mut known = vec![None; calls.len()];
        for rule in 0..calls.len() {
            self.depth(rule, 0, &calls, &mut known)?;
        }
        Ok(())
    }

    fn depth(
        &self,
        rule: usize,
        level: usize,
        calls: &[Vec<(usize, usize)>],
        known: &mut [Option<usize>],
    ) -> Result<usize, Fault> {
        if let Some(depth) = known.get(rule).copied().flatten() {
            return Ok(depth);
        }
        let mut deepest = 0;
        for (target, at) in calls.get(rule).into_iter().flatten() {
            // A circle is endless, so it ends here too.
            if level >= REGO_RULE_DEPTH_MAX {
                return Err(self.fault(
                    *at,
                    format!("rules refer to rules more than {REGO_RULE_DEPTH_MAX} deep, or to themselves"),
                ));
            }
            deepest = deepest.max(self.depth(*target, level + 1, calls, known)? + 1);
            if deepest > REGO_RULE_DEPTH_MAX {
                return Err(self.fault(
                    *at,
                    format!("rules refer to rules more than {REGO_RULE_DEPTH_MAX} deep"),
                ));
            }
        }
        if let Some(depth) = known.get_mut(rule) {
            *depth = Some(deepest);
        }
        Ok(deepest)
    }

    /// Whether a reference can come to rest on what holds rules and is none.
    fn ends_on_a_package(&self, path: &[LiteralOrRegister]) -> bool {
        let mut nodes = vec![&self.program.rule_tree[&Value::from("data")]];
        for component in path {
            nodes = nodes
                .into_iter()
                .filter_map(|node| node.as_object().ok())
                .flat_map(|children| -> Vec<&Value> {
                    match component {
                        LiteralOrRegister::Literal(index) => self
                            .program
                            .literals
                            .get(usize::from(*index))
                            .and_then(|key| children.get(key))
                            .into_iter()
                            .collect(),
                        LiteralOrRegister::Register(_) => children.values().collect(),
                    }
                })
                .collect();
        }
        nodes.iter().any(|node| node.as_object().is_ok())
    }

    fn reachable(&self, path: &[LiteralOrRegister], targets: &mut Vec<usize>) {
        let mut node = &self.program.rule_tree[&Value::from("data")];
        for component in path {
            match component {
                LiteralOrRegister::Literal(index) => {
                    let Some(key) = self.program.literals.get(usize::from(*index)) else {
                        break;
                    };
                    node = &node[key];
                }
                LiteralOrRegister::Register(_) => break,
            }
            if !matches!(node, Value::Object(_)) {
                break;
            }
        }
        collect(node, targets);
    }

    /// Puts guarded functions in the place of operators, and looks at every call.
    fn rewrite(&mut self) -> Result<(), Fault> {
        let mut comprehensions: Vec<u8> = Vec::new();
        for at in 0..self.program.instructions.len() {
            let Some(instruction) = self.program.instructions.get(at).copied() else {
                break;
            };
            let operator = match instruction {
                Instruction::Add { dest, left, right } => Some(("+", dest, left, right)),
                Instruction::Sub { dest, left, right } => Some(("-", dest, left, right)),
                Instruction::Mul { dest, left, right } => Some(("*", dest, left, right)),
                Instruction::Div { dest, left, right } => Some(("/", dest, left, right)),
                Instruction::Mod { dest, left, right } => Some(("%", dest, left, right)),
                Instruction::Lt { dest, left, right } => Some(("<", dest, left, right)),
                Instruction::Le { dest, left, right } => Some(("<=", dest, left, right)),
                Instruction::Gt { dest, left, right } => Some((">", dest, left, right)),
                Instruction::Ge { dest, left, right } => Some((">=", dest, left, right)),
                _ => None,
            };
            if let Some((name, dest, left, right)) = operator {
                let call = self.operator(name, dest, left, right);
                if let Some(place) = self.program.instructions.get_mut(at) {
                    *place = call;
                }
                continue;
            }
            match instruction {
                Instruction::BuiltinCall { params_index } => {
                    self.check_builtin(at, params_index)?
                }
                Instruction::FunctionCall { params_index } => {
                    self.check_function(at, params_index)?;
                }
                Instruction::ComprehensionBegin { params_index } => {
                    let params = self
                        .program
                        .instruction_data
                        .get_comprehension_begin_params(params_index)
                        .ok_or_else(|| self.fault(at, "a comprehension without parameters"))?;
                    comprehensions.push(params.result_reg);
                }
                Instruction::ComprehensionEnd {} => _ = comprehensions.pop(),
                Instruction::ComprehensionYield {
                    value_reg,
                    key_reg: None,
                } => self.defined(at, value_reg),
                Instruction::ComprehensionYield {
                    value_reg,
                    key_reg: Some(key),
                } => {
                    let object = comprehensions
                        .last()
                        .copied()
                        .ok_or_else(|| self.fault(at, "a yield outside a comprehension"))?;
                    self.guard_key(at, object, key, value_reg)?;
                }
                Instruction::ObjectSet { obj, key, value } => {
                    self.guard_key(at, obj, key, value)?;
                }
                Instruction::HostAwait { .. }
                | Instruction::LoadContext { .. }
                | Instruction::PolicyCondition { .. } => {
                    return Err(self.fault(at, "an instruction that is not Rego's"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn operator(&mut self, name: &'static str, dest: u8, left: u8, right: u8) -> Instruction {
        let program = &mut *self.program;
        let builtin_index = *self.operators.entry(name).or_insert_with(|| {
            program.add_builtin_info(BuiltinInfo {
                name: name.to_owned(),
                num_args: 2,
            })
        });
        let params_index = program.add_builtin_call_params(BuiltinCallParams {
            dest,
            builtin_index,
            num_args: 2,
            args: [left, right, 0, 0, 0, 0, 0, 0],
        });
        Instruction::BuiltinCall { params_index }
    }

    fn check_builtin(&self, at: usize, params_index: u16) -> Result<(), Fault> {
        let data = &self.program.instruction_data;
        let called = data
            .get_builtin_call_params(params_index)
            .and_then(|params| {
                Some((params, self.program.get_builtin_info(params.builtin_index)?))
            });
        let Some((params, info)) = called else {
            return Err(self.fault(at, "a call of nothing"));
        };
        if guarded(&info.name).is_none() && !OPERATORS.iter().any(|(name, _)| *name == info.name) {
            return Err(self.fault(at, format!("`{}` is not allowed", info.name)));
        }
        if u16::from(params.num_args) != info.num_args {
            return Err(self.fault(
                at,
                format!(
                    "`{}` takes {} arguments, not {}",
                    info.name, info.num_args, params.num_args
                ),
            ));
        }
        Ok(())
    }

    fn check_function(&self, at: usize, params_index: u16) -> Result<(), Fault> {
        let data = &self.program.instruction_data;
        let called = data
            .get_function_call_params(params_index)
            .and_then(|params| {
                let info = self
                    .program
                    .rule_infos
                    .get(usize::from(params.func_rule_index))?;
                Some((params, info, info.function_info.as_ref()?))
            });
        let Some((params, info, function)) = called else {
            return Err(self.fault(at, "a call of what is no function"));
        };
        let takes = usize::try_from(function.num_params).unwrap_or(usize::MAX);
        if takes > ARGUMENTS_MAX {
            let message = format!("`{}` has more than {ARGUMENTS_MAX} arguments", info.name);
            return Err(self.fault(at, message));
        }
        if takes != usize::from(params.num_args) {
            return Err(self.fault(
                at,
                format!(
                    "`{}` takes {takes} arguments, not {}",
                    info.name, params.num_args
                ),
            ));
        }
        Ok(())
    }

    /// A head that is undefined adds nothing; the machine would add a value that does not exist.
    fn defined(&mut self, at: usize, register: u8) {
        self.inserted
            .entry(at)
            .or_default()
            .push(Instruction::Guard {
                register,
                mode: GuardMode::NotUndefined,
            });
    }

    /// Compares what an object holds under a key with what it is to hold.
    fn guard_key(&mut self, at: usize, object: u8, key: u8, value: u8) -> Result<(), Fault> {
        let rule = self
            .owner(at)
            .ok_or_else(|| self.fault(at, "code outside a rule"))?;
        let free = self
            .program
            .rule_infos
            .get(rule)
            .map(|info| info.num_registers)
            .filter(|registers| *registers < REGISTERS_MAX);
        let Some(held) = free else {
            return Err(self.fault(at, "the rule is too large: split it"));
        };
        self.defined(at, key);
        self.defined(at, value);
        let look = Instruction::Index {
            dest: held,
            container: object,
            key,
        };
        let same = self.operator("#same", held, held, value);
        self.inserted.entry(at).or_default().extend([look, same]);
        Ok(())
    }

    /// Makes room for what is inserted, and moves every reference to code.
    fn relocate(&mut self) -> Result<(), Fault> {
        if self.inserted.is_empty() {
            return Ok(());
        }
        let rules: BTreeSet<usize> = self
            .inserted
            .keys()
            .filter_map(|at| self.owner(*at))
            .collect();
        let inserted = std::mem::take(&mut self.inserted);
        let program = &mut *self.program;
        for rule in rules {
            if let Some(info) = program.rule_infos.get_mut(rule) {
                // Once for a rule: its guards share the register.
                info.num_registers = info.num_registers.saturating_add(1);
            }
        }
        let old = std::mem::take(&mut program.instructions);
        let old_spans = std::mem::take(&mut program.instruction_spans);
        let mut moved = Vec::with_capacity(old.len() + 1);
        for (at, instruction) in old.into_iter().enumerate() {
            moved.push(program.instructions.len());
            let span = old_spans.get(at).cloned().flatten();
            for extra in inserted.get(&at).into_iter().flatten() {
                program.instructions.push(*extra);
                program.instruction_spans.push(span.clone());
            }
            program.instructions.push(instruction);
            program.instruction_spans.push(span);
        }
        moved.push(program.instructions.len());
        if program.instructions.len() > Program::MAX_INSTRUCTIONS {
            return Err(Fault::new("policies", 1, "the policies are too large"));
        }
        let to = |at: usize| moved.get(at).copied().unwrap_or(at);
        let short = |at: &mut u16| *at = u16::try_from(to(usize::from(*at))).unwrap_or(u16::MAX);
        let long = |at: u32| {
            let moved = to(usize::try_from(at).unwrap_or(usize::MAX));
            u32::try_from(moved).unwrap_or(u32::MAX)
        };
        for instruction in &mut program.instructions {
            match instruction {
                Instruction::LoopNext {
                    body_start,
                    loop_end,
                } => {
                    short(body_start);
                    short(loop_end);
                }
                Instruction::LogicalBlockStart { end_pc, .. }
                | Instruction::AllOfNext { end_pc, .. }
                | Instruction::AnyOfNext { end_pc, .. } => short(end_pc),
                _ => {}
            }
        }
        for params in &mut program.instruction_data.loop_params {
            short(&mut params.body_start);
            short(&mut params.loop_end);
        }
        for params in &mut program.instruction_data.comprehension_begin_params {
            short(&mut params.body_start);
            short(&mut params.comprehension_end);
        }
        for info in &mut program.rule_infos {
            let bodies = info.definitions.iter();
            let bodies = bodies.map(|body| body.iter().map(|at| long(*at)).collect());
            info.definitions = Arc::new(bodies.collect());
            for block in info.destructuring_blocks.iter_mut().flatten() {
                *block = long(*block);
            }
        }
        for at in program.entry_points.values_mut() {
            *at = to(*at);
        }
        program.main_entry_point = long(program.main_entry_point);
        Ok(())
    }

    /// Gives each definition of a rule with several a rule of its own, and the rule a body that asks
    /// them all and compares. Where all definitions give one constant there is nothing to compare.
    fn split(&mut self) -> Result<(), Fault> {
        for rule in 0..self.program.rule_infos.len() {
            let Some(info) = self.program.rule_infos.get(rule).cloned() else {
                break;
            };
            let several = info.definitions.len() > 1;
            if !several || info.rule_type != RuleType::Complete || info.early_exit_on_first_success
            {
                continue;
            }
            self.split_rule(rule, &info)?;
        }
        let widest = self
            .program
            .rule_infos
            .iter()
            .map(|info| info.num_registers);
        self.program.max_rule_window_size = widest.max().unwrap_or_default();
        Ok(())
    }

    fn split_rule(&mut self, rule: usize, info: &RuleInfo) -> Result<(), Fault> {
        let at = info
            .definitions
            .iter()
            .flatten()
            .next()
            .and_then(|begin| usize::try_from(*begin).ok())
            .unwrap_or_default();
        let fault = self.fault(at, "the rule is too large: split it");
        let too_large = || fault.clone();
        let value = info.num_registers;
        let boxed = value.checked_add(1).ok_or_else(too_large)?;
        let all = value.checked_add(2).ok_or_else(too_large)?;
        let first = value.checked_add(3).ok_or_else(too_large)?;
        let registers = value.checked_add(4).ok_or_else(too_large)?;
        let rule_index = u16::try_from(rule).map_err(|_| too_large())?;

        let mut parts = Vec::new();
        for (number, bodies) in info.definitions.iter().enumerate() {
            let mut part = info.clone();
            part.name = format!("{}#{number}", info.name);
            part.definitions = Arc::new(vec![bodies.clone()]);
            part.destructuring_blocks =
                vec![info.destructuring_blocks.get(number).copied().flatten()];
            part.else_bodies = vec![info.else_bodies.get(number).cloned().unwrap_or_default()];
            part.default_literal_index = None;
            let index = u16::try_from(self.program.rule_infos.len()).map_err(|_| too_large())?;
            self.program.rule_infos.push(part);
            parts.push(index);
        }
        let begin = u32::try_from(self.program.instructions.len()).unwrap_or(u32::MAX);
        self.append(Instruction::RuleInit {
            result_reg: info.result_reg,
            rule_index,
        });
        for (number, part) in parts.into_iter().enumerate() {
            let call = match &info.function_info {
                None => Instruction::CallRule {
                    dest: value,
                    rule_index: part,
                },
                Some(function) => {
                    let params = FunctionCallParams {
                        func_rule_index: part,
                        dest: value,
                        num_args: u8::try_from(function.num_params).unwrap_or(u8::MAX),
                        // The machine puts arguments behind its first register.
                        args: [1, 2, 3, 4, 5, 6, 7, 8],
                    };
                    Instruction::FunctionCall {
                        params_index: self.program.add_function_call_params(params),
                    }
                }
            };
            self.append(call);
            // In a box, so that a part without a value can be told from one whose value is null.
            let params_index =
                self.program
                    .instruction_data
                    .add_array_create_params(ArrayCreateParams {
                        dest: boxed,
                        elements: vec![value],
                    });
            self.append(Instruction::ArrayCreate { params_index });
            self.append(Instruction::CoalesceUndefinedToNull { register: boxed });
            let join = if number == 0 {
                Instruction::Move {
                    dest: all,
                    src: boxed,
                }
            } else {
                self.operator("#one", all, all, boxed)
            };
            self.append(join);
        }
        let zero = u16::try_from(self.program.add_literal(Value::from(0_u64)))
            .map_err(|_| Fault::new("policies", 1, "too many literals"))?;
        self.append(Instruction::Load {
            dest: first,
            literal_idx: zero,
        });
        self.append(Instruction::Index {
            dest: info.result_reg,
            container: all,
            key: first,
        });
        self.append(Instruction::RuleReturn {});
        if let Some(whole) = self.program.rule_infos.get_mut(rule) {
            whole.definitions = Arc::new(vec![vec![begin]]);
            whole.destructuring_blocks = vec![None];
            whole.else_bodies = vec![vec![false]];
            whole.num_registers = registers;
        }
        Ok(())
    }

    fn append(&mut self, instruction: Instruction) {
        self.program.instructions.push(instruction);
        self.program.instruction_spans.push(None);
    }

    /// Calls go through the guards from here on.
    fn resolve(&mut self) -> Result<(), Fault> {
        let mut resolved = Vec::with_capacity(self.program.builtin_info_table.len());
        for info in &self.program.builtin_info_table {
            let operator = OPERATORS
                .iter()
                .find(|(name, _)| *name == info.name)
                .map(|(_, function)| *function);
            let function = operator.or_else(|| guarded(&info.name)).ok_or_else(|| {
                Fault::new("policies", 1, format!("`{}` is not allowed", info.name))
            })?;
            resolved.push(function);
        }
        self.program.resolved_builtins = resolved;
        Ok(())
    }
}

/// Every rule in a part of the rule tree.
fn collect(node: &Value, rules: &mut Vec<usize>) {
    match node {
        Value::Number(_) => {
            rules.extend(
                node.as_u64()
                    .ok()
                    .and_then(|rule| usize::try_from(rule).ok()),
            );
        }
        Value::Object(fields) => fields.values().for_each(|field| collect(field, rules)),
        _ => {}
    }
}
