package kernel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// packages are those whose tests run on the other kernel, each with the flags of
// its test binary, and tests that must be among those that it ran: the data path
// as a whole, and a lab with all its life.
var packages = []struct {
	name         string
	flags, tests []string
}{
	{"layer/service", serviceFlags(), serviceTests},
	{"layer/trace", traceFlags(), traceTests},
	{"layer/dns", []string{"-test.run=^(" + strings.Join(dnsTests, "|") + ")$"}, dnsTests},
	{"layer/nodedns", []string{"-test.run=^(" + strings.Join(nodednsTests, "|") + ")$"}, nodednsTests},
	{"layer/pod", []string{"-test.run=^(" + strings.Join(podTests, "|") + ")$"}, podTests},
	{"layer/route", []string{"-test.run=^(" + strings.Join(routeTests, "|") + ")$"}, routeTests},
	{"layer/masquerade", []string{"-test.run=^(" + strings.Join(masqueradeTests, "|") + ")$"}, masqueradeTests},
	{"lab", labFlags(), labTests},
}

// podTests are that pods get their network, that what was taken away is seen and comes
// back, the laws, and that the program is accepted.
var podTests = []string{"TestAPodBeginsAndEnds", "TestWhatIsMissing", "TestTheFileIsLost", "TestReboot", "TestLaws", "TestWhatTakesAShortcut"}

// traceTests are that each program sees its event, where the kernel has a tracepoint
// for it, that nothing is lost of the totals, and that trials are no loss.
var traceTests = []string{"TestEveryProgramSeesItsEvent", "TestExamplesAreWhole", "TestTotalsAreExact", "TestNothingIsLeftBehind", "TestTrialsAreNoLoss"}

func traceFlags() []string {
	return []string{"-test.run=^(" + strings.Join(traceTests, "|") + ")$"}
}

// dnsTests are that the program is accepted and answers, also pods behind a bridge, that
// it does not mix names up, that another takes over, and that without it others answer;
// that queries are handed up to an agent, and not to one that was killed; that the table
// grows, that what is known is said where nobody else can, and that filters of earlier versions
// are taken over.
var dnsTests = []string{"TestAnswers", "TestPodsBehindABridge", "TestNamesAreWrittenMeanwhile", "TestOutside", "TestOutsideIsWrittenMeanwhile", "TestAnotherLayout", "TestFailOpen",
	"TestHandedUp", "TestKilledUnderLoad", "TestSuccessorAnswers", "TestOneAfterTheOther", "TestAgentHangs", "TestTheMapGrows", "TestAgentAndServersAreGone", "TestFilterOfEarlierVersions"}

// nodednsTests are that the programs are accepted, that the agent is asked while it is there
// and no longer, by all kinds of sockets, and that its successor answers what it had in hand.
var nodednsTests = []string{"TestTheAgentAnswers", "TestWhatIsLeft", "TestTheSocketIsClosed", "TestTheNextAnswersWhatWasInHand", "TestTheNextHasThePort"}

// masqueradeTests are that the programs are accepted and write what they should, and that
// pods reach the world, by pings and in fragments too.
var masqueradeTests = []string{"TestThereAndBack", "TestToWire", "TestPodsReachTheWorld", "TestFragments", "TestPings", "TestRoutersAreHeard"}

// routeTests are that the programs are accepted and decide as they should, and that pods of
// two nodes, and a node and a pod, reach each other, also where the other end is plain, and
// strangers reach nobody.
var routeTests = []string{"TestFromPod", "TestFromWire", "TestCongestion", "TestPodsOfTwoNodes", "TestNodeToPod", "TestTooLong", "TestDirect", "TestStrangers"}

// serviceTests are what of the data path is always tested there: that every
// program is accepted, both paths, and the laws.
var serviceTests = []string{"TestEveryProgramPassesTheVerifier", "TestConnectionsReachTheEndpointAndSeeTheService",
	"TestPacketsReachTheEndpointAndComeFromTheService", "TestErrorsAboutTranslatedPackets", "TestPacketPathByFilters",
	"TestHairpin", "TestRefusedPacketsAreToldAtOnce", "TestFlowsExpire", "TestNextProcessTakesThePacketPathOver",
	"TestMapsGrowUnderTraffic", "TestOtherLayoutIsReplacedWithoutAGap", "TestUpgradeKeepsTheFlowsOfSockets",
	"TestDatagramsStayWithTheirEndpointUntilItIsGone", "TestNoEndpointIsRefusedAtOnce", "TestLaws",
	"TestClientsElsewhereReachEveryEntry", "TestExternalPolicyLocal", "TestSourceRanges", "TestAffinity",
	"TestErrorsAboutMasqueradedPackets"}

// serviceFlags: all of it on emulated processors takes many minutes. With
// MILLRACE_KERNEL_RUN, a regular expression, other tests are chosen.
func serviceFlags() []string {
	const whole = "-test.timeout=50m"
	if chosen := os.Getenv("MILLRACE_KERNEL_RUN"); chosen != "" {
		return []string{whole, "-test.run=" + chosen}
	}
	if os.Getenv("MILLRACE_LONG") == "" {
		return []string{"-test.run=^(" + strings.Join(serviceTests, "|") + ")$"}
	}
	return []string{whole}
}

// labTests are what of the lab is always tested there.
var labTests = []string{"TestScale", "TestTwoLabsDoNotCollide", "TestKilledDaemonIsCleanedUp", "TestPodsSocketsBelongToThePodsGroup"}

// labFlags: the lab on emulated processors takes a minute, so all of it is
// tested only when there is time. There are no programs but ours for TestExec and
// TestStartHearsOfAKilledDaemon to run.
func labFlags() []string {
	if os.Getenv("MILLRACE_LONG") == "" {
		return []string{"-test.run=^(" + strings.Join(labTests, "|") + ")$"}
	}
	return []string{"-test.skip=^(TestExec|TestStartHearsOfAKilledDaemon)$"}
}

const (
	root  = "../.."
	cache = root + "/.cache/kernel"
)

// wholePatience is how long all tests may take; emulated, those of CI take a minute or
// two, all of them half an hour.
func wholePatience() time.Duration {
	if os.Getenv("MILLRACE_LONG") == "" && os.Getenv("MILLRACE_KERNEL_RUN") == "" {
		return 8 * time.Minute
	}
	return 55 * time.Minute
}

// bootPatience is how long the machine may be silent before init speaks:
// emulated, on a loaded machine, it takes 7 s.
var bootPatience = map[string]time.Duration{"kvm": 20 * time.Second, "tcg": 90 * time.Second}

// What works here, where the tests run otherwise, works on the oldest kernel of
// a distribution that we support too.
func TestOnDebianKernel(t *testing.T) {
	m := runMachine(t, wholePatience(), packTests)
	m.report()
}

// faultsPatience is how long the faults of the lab may take: emulated, each takes some
// twenty seconds.
const faultsPatience = 50 * time.Minute

// What trace names there of the faults that were measured, and of healthy runs: the
// kernel has fewer signals, so that this is a score, and no run has to be right. That a
// cause is named which is not there is an error here as anywhere.
func TestFaultsOnDebianKernel(t *testing.T) {
	if os.Getenv("MILLRACE_FAULTS") == "" {
		t.Skip("asked for by MILLRACE_FAULTS=1: make faults-kernel")
	}
	m := runMachine(t, faultsPatience, func(t *testing.T, a *archive, work string) {
		program := filepath.Join(work, "millrace")
		build(t, "build", "-o", program, "./cmd/millrace")
		a.addFile(t, "commands/faults/program", program)
		a.add("commands/faults/flags", modeFile, []byte("lab\nfaults\nlisted\ncontrols"))
	})
	if !m.ended["faults"] {
		t.Error("the faults did not end")
	}
	score := regexp.MustCompile(`(?m)^(as listed|controls) .*$`)
	for _, line := range score.FindAllString(m.said, -1) {
		t.Log(line)
	}
}

// runMachine boots a machine with what fill puts into it, and follows it to its end.
func runMachine(t *testing.T, patience time.Duration, fill func(t *testing.T, a *archive, work string)) *machine {
	t.Helper()
	kernel := kernelFolder(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64: apt-get install qemu-system-x86")
	}
	initramfs := filepath.Join(t.TempDir(), "initramfs")
	if err := os.WriteFile(initramfs, pack(t, kernel, fill), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel: %s", filepath.Base(kernel))
	m := &machine{t: t, patience: patience}
	for _, accelerator := range accelerators() {
		m.begun = time.Now()
		err := m.boot(accelerator, filepath.Join(kernel, "vmlinuz"), initramfs)
		if errors.Is(err, errSilent) && accelerator == "kvm" {
			t.Log("kvm: the machine does not start; emulation instead")
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	return m
}

// kernelFolder is where `fetch` put the kernel.
func kernelFolder(t *testing.T) string {
	t.Helper()
	name, err := os.ReadFile(filepath.Join(cache, "current"))
	if errors.Is(err, fs.ErrNotExist) {
		if reason, err := os.ReadFile(filepath.Join(cache, "absent")); err == nil {
			t.Skip(strings.TrimSpace(string(reason)))
		}
		t.Skip("needs a kernel: run `make test-kernel`, which fetches one")
	}
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(cache, strings.TrimSpace(string(name)))
}

// accelerators are tried in turn. KVM is opt-in, MILLRACE_ACCEL=kvm: inside a
// virtual machine /dev/kvm may open and yet run no guest.
func accelerators() []string {
	if os.Getenv("MILLRACE_ACCEL") == "kvm" {
		return []string{"kvm", "tcg"}
	}
	return []string{"tcg"}
}

// programs are those of others that tests make rules of firewalls and queues with, and
// extensions is where those of iptables look for theirs.
var programs = []string{"nft", "iptables", "iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy", "tc"}

const extensions = "/usr/lib/x86_64-linux-gnu/xtables"

// pack makes the machine's root: init, the modules, programs, and what fill adds.
func pack(t *testing.T, kernel string, fill func(t *testing.T, a *archive, work string)) []byte {
	t.Helper()
	archive := &archive{libraries: map[string]bool{}}
	work := t.TempDir()
	build(t, "build", "-o", filepath.Join(work, "init"), "./test/kernel/init")
	archive.addFile(t, "init", filepath.Join(work, "init"))
	archive.folder("modules")
	modules, err := filepath.Glob(filepath.Join(kernel, "modules", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, module := range modules {
		archive.addFile(t, "modules/"+filepath.Base(module), module)
	}
	for _, name := range programs {
		archive.addProgram(t, name)
	}
	archive.addTree(t, extensions[1:], extensions)
	fill(t, archive, work)
	return archive.end()
}

// packTests adds for each package its tests with their testdata.
func packTests(t *testing.T, archive *archive, work string) {
	t.Helper()
	for _, name := range []string{"bpf", "docs", "bench/testdata"} { // tests of other packages read them
		archive.addTree(t, "tests/"+name, filepath.Join(root, name))
	}
	for _, p := range packages {
		binary := filepath.Join(work, strings.ReplaceAll(p.name, "/", "-"))
		build(t, "test", "-c", "-o", binary, "./"+p.name)
		archive.addFile(t, "tests/"+p.name+"/package.test", binary)
		archive.add("tests/"+p.name+"/flags", modeFile, []byte(strings.Join(p.flags, "\n")))
		archive.addTree(t, "tests/"+p.name+"/testdata", filepath.Join(root, p.name, "testdata"))
	}
}

// build calls go for the machine: statically, for it has no C library.
func build(t *testing.T, verb string, args ...string) {
	t.Helper()
	command := exec.Command("go", append([]string{verb, "-ldflags=-s -w"}, args...)...)
	command.Dir = root
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("go %s %s: %v\n%s", verb, strings.Join(args, " "), err, out)
	}
}

// machine is one virtual machine and what its tests said.
type machine struct {
	t        *testing.T
	begun    time.Time
	patience time.Duration
	said     string // all of the console
	folder   string // the package that is being tested
	results  []*result
	open     map[string]*result
	ended    map[string]bool // packages that ended
	failed   []string        // packages that ended otherwise than passed
}

// result is one test on the other kernel.
type result struct{ folder, name, outcome, output string }

// processor is what the machine has: without the wide registers, which take
// longer to emulate than they save.
var processor = map[string]string{"kvm": "host", "tcg": "qemu64,+rdrand"}

// kernelOptions: the console is the serial line; a panic ends the machine; a
// grace period of RCU, which every change of a program waits for, does not wait
// for the emulated processors' ticks (measured: 18 s for all tests, not 33).
const kernelOptions = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on rcupdate.rcu_expedited=1"

var errSilent = errors.New("the machine did not come up")

// boot starts the machine and follows its console until it ends.
func (m *machine) boot(accelerator, kernel, initramfs string) error {
	ctx, cancel := context.WithTimeout(context.Background(), m.patience)
	defer cancel()
	command := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", accelerator, "-cpu", processor[accelerator], "-m", "1024", "-smp", "2",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", kernel, "-initrd", initramfs, "-append", kernelOptions)
	command.Stderr = os.Stderr
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a killed test leaves no machine behind
	console, err := command.StdoutPipe()
	if err != nil {
		return err
	}
	if err := command.Start(); err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	silent := time.AfterFunc(bootPatience[accelerator], cancel)
	spoke, finished, tail := m.follow(console, func() { silent.Stop() })
	_ = command.Wait() // what counts is what the machine said
	after := time.Since(m.begun).Round(time.Second)
	switch {
	case finished:
		return nil
	case !spoke:
		return fmt.Errorf("%w: qemu ended after %v with %v; the console:\n%s", errSilent, after, command.ProcessState, tail)
	default:
		return fmt.Errorf("the machine did not finish its tests: qemu ended after %v with %v; the last of the console:\n%s",
			after, command.ProcessState, tail)
	}
}

var (
	starts  = regexp.MustCompile(`^\s*=== (?:RUN|CONT|NAME)\s+(\S+)`)
	outcome = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)
)

// follow reads the console: it logs every line and gathers the results. tail is
// the end of what was said.
func (m *machine) follow(console io.Reader, first func()) (spoke, finished bool, tail string) {
	m.open, m.ended = map[string]*result{}, map[string]bool{}
	var current *result
	var last []string
	lines := bufio.NewScanner(console)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		fmt.Fprintln(m.t.Output(), "|", line) // the bar: `go test -json` must not take it for its own
		m.said += line + "\n"
		if last = append(last, line); len(last) > 60 {
			last = last[1:]
		}
		words := strings.SplitN(line, " ", 4)
		switch {
		case strings.HasPrefix(line, "@@ begin "):
			if !spoke {
				first()
				m.t.Logf("the machine was up after %v", time.Since(m.begun).Round(100*time.Millisecond))
			}
			spoke, m.folder = true, words[2]
		case strings.HasPrefix(line, "@@ end "):
			m.ended[m.folder], current = true, nil
			if words[3] != "passed" {
				m.failed = append(m.failed, m.folder+": "+words[3])
			}
		case strings.HasPrefix(line, "@@ done"):
			finished = true
		case starts.MatchString(line):
			current = m.result(starts.FindStringSubmatch(line)[1])
		case outcome.MatchString(line):
			found := outcome.FindStringSubmatch(line)
			current = m.result(found[2])
			current.outcome = found[1]
		case current != nil && m.folder != "":
			current.output += line + "\n"
		}
	}
	return spoke, finished, strings.Join(last, "\n")
}

// result is the record of one test of the package that runs.
func (m *machine) result(name string) *result {
	key := m.folder + " " + name
	if m.open[key] == nil {
		m.open[key] = &result{folder: m.folder, name: name}
		m.results = append(m.results, m.open[key])
	}
	return m.open[key]
}

// untested names the packages that did not end or of which no test passed, and
// the tests that must have run and did not: one that was renamed, say.
func (m *machine) untested() (missing []string) {
	passed := map[string]bool{}
	for _, r := range m.results {
		passed[r.folder] = passed[r.folder] || r.outcome == "PASS"
	}
	for _, p := range packages {
		if !m.ended[p.name] || !passed[p.name] {
			missing = append(missing, p.name)
		}
		for _, test := range p.tests {
			if m.open[p.name+" "+test] == nil {
				missing = append(missing, p.name+" "+test)
			}
		}
	}
	return missing
}

// report makes each test on the other kernel a test of this one.
func (m *machine) report() {
	for _, what := range m.untested() {
		if os.Getenv("MILLRACE_KERNEL_RUN") == "" {
			m.t.Errorf("the machine did not test %s", what)
		}
	}
	for _, r := range m.results {
		m.t.Run(r.folder+"/"+r.name, func(t *testing.T) {
			switch r.outcome {
			case "PASS":
			case "SKIP":
				t.Skip(strings.TrimSpace(r.output))
			case "FAIL":
				t.Error("on the other kernel:\n" + r.output)
			default:
				t.Error("on the other kernel it did not end:\n" + r.output)
			}
		})
	}
	for _, line := range m.failed {
		m.t.Errorf("tests of %s", line)
	}
	m.t.Logf("%d tests of %d packages in %v", len(m.results), len(m.ended), time.Since(m.begun).Round(time.Second))
}

// A console on which packages end well, and yet not all was tested.
func TestWhatWasNotTestedIsNoticed(t *testing.T) {
	passed := func(names []string) (lines string) {
		for _, name := range names {
			lines += "--- PASS: " + name + " (0.1s)\n"
		}
		return lines
	}
	all := ""
	for _, p := range packages {
		all += "@@ begin " + p.name + "\n" + passed(p.tests) + "@@ end " + p.name + " passed\n"
	}
	all += "@@ done\n"
	for console, want := range map[string][]string{
		all: nil,
		strings.ReplaceAll(all, passed(serviceTests), strings.ReplaceAll(passed(serviceTests), "PASS", "SKIP")): {"layer/service"},
		strings.ReplaceAll(all, "TestHairpin", "TestHairpins"):                                                  {"layer/service TestHairpin"},
		strings.ReplaceAll(all, passed(labTests), "testing: no tests to run\n"): {"lab", "lab " + labTests[0],
			"lab " + labTests[1], "lab " + labTests[2], "lab " + labTests[3]},
		strings.ReplaceAll(all, "TestScale", "TestScaling"): {"lab TestScale"},
		strings.ReplaceAll(all, "@@ end lab passed", ""):    {"lab"},
	} {
		m := &machine{t: t, begun: time.Now()}
		m.follow(strings.NewReader(console), func() {})
		if got := m.untested(); !slices.Equal(got, want) {
			t.Errorf("not tested is %q, want %q; the console:\n%s", got, want, console)
		}
	}
}

// archive is a cpio archive in the form the kernel unpacks
// (Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	bytes.Buffer
	inode              int
	folders, libraries map[string]bool
}

const (
	modeFolder = 0o040755
	modeFile   = 0o100755
)

func (a *archive) add(name string, mode int, content []byte) {
	a.inode++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.align()
	a.Write(content)
	a.align()
}

func (a *archive) align() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}

// folder adds a folder and those above it, once.
func (a *archive) folder(name string) {
	if name == "." || a.folders[name] {
		return
	}
	a.folder(filepath.Dir(name))
	if a.folders == nil {
		a.folders = map[string]bool{}
	}
	a.folders[name] = true
	a.add(name, modeFolder, nil)
}

func (a *archive) addFile(t *testing.T, name, from string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	a.folder(filepath.Dir(name))
	a.add(name, modeFile, content)
}

var library = regexp.MustCompile(`(/\S+) \(0x`)

// addProgram adds a program of this host, which test/needs has installed, and the
// libraries that it is linked with.
func (a *archive) addProgram(t *testing.T, name string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	a.addFile(t, "bin/"+name, path)
	linked, err := exec.Command("ldd", path).Output()
	if err != nil {
		t.Fatalf("ldd %s: %v", path, err)
	}
	for _, found := range library.FindAllSubmatch(linked, -1) {
		if from := string(found[1]); !a.libraries[from] {
			a.libraries[from] = true
			a.addFile(t, from[1:], from)
		}
	}
}

// addTree adds a folder with all files below it; a folder that is not there is
// left out.
func (a *archive) addTree(t *testing.T, name, from string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path == from {
			return nil
		}
		if err == nil && entry.Type().IsRegular() {
			a.addFile(t, name+strings.TrimPrefix(path, from), path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// end closes the archive.
func (a *archive) end() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.Bytes()
}
