package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// needRoot skips without root, and checks at the end that this process left no
// namespace, cgroup or worker behind.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and cgroups")
	}
	t.Cleanup(func() {
		for _, path := range leftBy(t, os.Getpid()) {
			t.Errorf("left behind: %s", path)
		}
	})
}

// needTools skips where kube-proxy's tools are not installed.
func needTools(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"iptables-nft-restore", "iptables-legacy-restore", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: apt-get install iptables nftables", tool)
		}
	}
}

func runGroup(t *testing.T, pid int) string {
	t.Helper()
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, groupPrefix+strconv.Itoa(pid))
}

// leftBy lists what a run by the process pid has on this host.
func leftBy(t *testing.T, pid int) []string {
	t.Helper()
	var left []string
	folder := filepath.Join(runsFolder, strconv.Itoa(pid))
	for _, path := range []string{folder, runGroup(t, pid)} {
		if _, err := os.Stat(path); err == nil {
			left = append(left, path)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, folder+"/") {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	return left
}

func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited 20 s for: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// openSession is what Services does before it measures.
func openSession(t *testing.T, o Options) *session {
	t.Helper()
	o, err := o.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	cpu, err := lastProcessor()
	if err != nil {
		t.Fatal(err)
	}
	folders, err := openRun()
	if err != nil {
		t.Fatal(err)
	}
	s := &session{Options: o, run: folders, cpu: cpu, report: &Report{Header: newHeader("services", o.settings(cpu))}}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestServices(t *testing.T) {
	needRoot(t)
	needTools(t)
	var progress strings.Builder
	variants := append(slices.Clone(DefaultVariants), NativeAgain)
	report, err := Services(t.Context(), Options{
		Services: []int{40, 2, 40}, Variants: variants, Rounds: 2, RoundTime: 40 * time.Millisecond, Progress: &progress,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, services := range []int{2, 40} {
		for _, name := range []string{Native, NativeAgain, IptablesNft, IptablesLegacy, Nftables} {
			for _, operation := range DefaultOperations {
				checkMeasured(t, report, operation, name, services)
			}
			checkCosts(t, report, name, services)
		}
		if report.Row(Millrace, services, "", MetricP50(Connection)) != nil {
			t.Errorf("millrace has figures with %d Services, though nothing was attached", services)
		}
	}
	if len(report.Warnings) > 0 {
		t.Errorf("warnings: %s", report.Warnings)
	}
	want := "millrace-packet left out: nothing was given to attach under that name (bench.Options.Attach)"
	if len(report.Skipped) != 2 || report.Skipped[1].String() != want {
		t.Errorf("left out: %v, want both paths, and: %s", report.Skipped, want)
	}
	if !strings.Contains(progress.String(), "prepare nftables, 40 Services\n") || !strings.Contains(progress.String(), "round 1 of 2\n") {
		t.Errorf("progress does not tell what it does:\n%s", &progress)
	}
}

// checkMeasured wants all figures of an operation, from both rounds, in their
// units; and that beds with many Services compare to those with few.
func checkMeasured(t *testing.T, report *Report, operation, name string, services int) {
	t.Helper()
	who := fmt.Sprintf("%s with %d Services", name, services)
	get := func(metric string) Row {
		row := report.Row(name, services, "", metric)
		if row == nil {
			t.Fatalf("%s has no %s; left out: %v", who, metric, report.Skipped)
		}
		return *row
	}
	for _, metric := range []string{MetricP50(operation), MetricP99(operation), MetricCPU(operation)} {
		row := get(metric)
		if row.Unit != "us" || row.Rounds != 2 || row.Min < 1 || row.Max > 1e6 || row.Ratio == nil || len(row.Ratio.Samples) != 2 {
			t.Errorf("%s: %s is %+v", who, metric, row)
		}
		if (row.Growth != nil) != (services == 40) {
			t.Errorf("%s: %s compares to 2 Services with %+v", who, metric, row.Growth)
		}
	}
	if p50, p99 := get(MetricP50(operation)), get(MetricP99(operation)); p50.Min > p99.Min {
		t.Errorf("%s: p50 %v us is above p99 %v us", who, p50.Min, p99.Min)
	}
	if row := get(MetricCount(operation)); row.Min < 5 {
		t.Errorf("%s: only %v %s in a round", who, row.Min, row.Metric)
	}
	if row := get(MetricErrors(operation)); row.Max > 0 {
		t.Errorf("%s: %v %s", who, row.Max, row.Metric)
	}
}

// checkCosts wants what loading and changing took, and the memory where the kernel
// says it; native has none of it.
func checkCosts(t *testing.T, report *Report, name string, services int) {
	t.Helper()
	for metric, unit := range map[string]string{MetricLoad: "ms", MetricChange: "ms", MetricKernel: "bytes"} {
		row := report.Row(name, services, "", metric)
		wanted := name == IptablesLegacy || metric != MetricKernel && name != Native && name != NativeAgain
		switch {
		case (row != nil) != wanted:
			t.Errorf("%s with %d Services: %s is %+v", name, services, metric, row)
		case row != nil && (row.Unit != unit || row.Min <= 0):
			t.Errorf("%s with %d Services: %s is %+v", name, services, metric, row)
		case metric == MetricChange && row != nil && (row.Rounds < 2 || row.Rounds > 2*maxReplacements):
			t.Errorf("%s with %d Services: %d changes", name, services, row.Rounds)
		}
	}
}

// An endpoint is replaced in the kernel and not on paper: connections reach the
// new one and no longer the old one, and after changing back it is the other way.
func TestRuleSetsChange(t *testing.T) {
	needRoot(t)
	needTools(t)
	s := openSession(t, Options{Services: []int{9}, Endpoints: 3, Positions: []string{First, Last},
		Variants: []string{IptablesNft, IptablesLegacy, Nftables}})
	if err := s.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(s.cells) != 1+2+2+1 {
		t.Fatalf("%d beds, want native, nftables and two by two of iptables; left out: %v", len(s.cells), s.report.Skipped)
	}
	for _, c := range s.cells[1:] {
		tested, _ := testedIndex(c.position, 9)
		before := cluster(9, 3, tested)[tested]
		after := withReplacedEndpoint(before)
		for _, step := range [][2]*model.Service{{before, after}, {after, before}} {
			if _, err := c.loaded.change(t.Context(), step[0], step[1]); err != nil {
				t.Fatalf("%s: %v", c, err)
			}
			answered := map[string]bool{}
			for range 100 {
				answer, err := c.bed.clientProcess.tell(command{Targets: c.targets})
				if err != nil || answer.Errors > 0 {
					t.Fatalf("%s: connect: %s %v", c, answer.FirstError, err)
				}
				answered[answer.Backend] = true
			}
			var want []string
			for _, address := range addresses(step[1]) {
				want = append(want, address.String())
			}
			if got := slices.Sorted(maps.Keys(answered)); !slices.Equal(got, want) {
				t.Errorf("%s: after the change %v answer, want %v", c, got, want)
			}
		}
	}
}

// The client connects to a Service's address and a backend answers; conntrack
// saw it in that node, and sees nothing where there is no Service.
func TestRuleSetsTranslate(t *testing.T) {
	needRoot(t)
	needTools(t)
	s := openSession(t, Options{Services: []int{9}, Endpoints: 3, Positions: []string{First, Middle, Last},
		Variants: []string{IptablesNft, IptablesLegacy, Nftables}})
	if err := s.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(s.cells) != 1+3+3+1 {
		t.Fatalf("%d beds, want native, nftables and two by three of iptables; left out: %v", len(s.cells), s.report.Skipped)
	}
	for _, c := range s.cells {
		tested, _ := testedIndex(c.position, 9)
		vip := serviceAddress(cluster(9, 3, tested)[tested])
		answer, err := c.bed.clientProcess.tell(command{Targets: c.targets})
		if err != nil || answer.Errors > 0 {
			t.Fatalf("%s: connect to %s: %s %v", c, c.targets[0], answer.FirstError, err)
		}
		if c.variant == Native {
			if entries := conntrackEntries(t, c); entries != 0 {
				t.Errorf("%s: conntrack has %d entries: some hook is registered", c, entries)
			}
			continue
		}
		if len(c.targets) != 1 || c.targets[0] != vip || answer.Backend == vip.String() || !strings.HasPrefix(answer.Backend, "10.244.2.") {
			t.Errorf("%s: connected to %v and %s answered, want %s and a backend", c, c.targets, answer.Backend, vip)
		}
		if entries := conntrackEntries(t, c); entries == 0 {
			t.Errorf("%s: conntrack has no entries: the rules did not translate", c)
		}
		checkPosition(t, c, tested, vip.Addr().String())
	}
}

func conntrackEntries(t *testing.T, c *cell) (entries int) {
	t.Helper()
	err := netns.Do(c.bed.node, func() error {
		data, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if errors.Is(err, os.ErrNotExist) { // no conntrack in this kernel, or not loaded
			return nil
		}
		if err == nil {
			entries, err = strconv.Atoi(strings.TrimSpace(string(data)))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// checkPosition reads the rules back from the kernel.
func checkPosition(t *testing.T, c *cell, tested int, vip string) {
	t.Helper()
	if c.position == "" {
		return
	}
	var rules []byte
	err := netns.Do(c.bed.node, func() (err error) {
		rules, err = exec.Command(c.variant+"-save", "-t", "nat").Output()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	order := portals(string(rules))
	if len(order) != 9 || order[tested] != vip {
		t.Errorf("%s: the rules in the kernel are for %v, want %s as number %d of 9", c, order, vip, tested+1)
	}
}

// nftAttach is an Attach that works: nft's rules.
func nftAttach(t *testing.T, attached, closed *int) Attach {
	tool := ruleTool{program: "nft", packageName: "nftables", rules: nftablesRules, arguments: []string{"-f", "-"}}
	return func(spec AttachSpec) (Attached, error) {
		took, err := tool.restore(t.Context(), spec.NetNS, "nft", []byte(nftablesRules(spec.Services)))
		*attached++
		tested := spec.Services[slices.IndexFunc(spec.Services, func(s *model.Service) bool {
			return podRange.Contains(s.Ports[0].Backends[0].Address.Addr())
		})]
		return Attached{
			LoadTime: took, KernelBytes: 4096, ResidentBytes: 8192,
			Change: func(to *model.Service) (time.Duration, error) {
				return tool.restore(t.Context(), spec.NetNS, "nft", []byte(nftablesChange(nil, tested, to)))
			},
			Close: func() error {
				*closed++
				return netns.Do(spec.NetNS, exec.Command("nft", "flush", "ruleset").Run)
			},
		}, err
	}
}

// Both variants under test get what they need to work with, and are measured.
func TestVariantsUnderTestAreAttached(t *testing.T) {
	needRoot(t)
	needTools(t)
	var attached, closed int
	work := nftAttach(t, &attached, &closed)
	attach := func(spec AttachSpec) (Attached, error) {
		processes, err := cgroup.Processes(spec.Cgroup)
		if err != nil || len(processes) != 1 {
			t.Errorf("the client's cgroup has the processes %v, want the client alone (%v)", processes, err)
		}
		byName := func(a, b *model.Service) int { return a.Name.Compare(b.Name) }
		if len(spec.Services) != 15 || !slices.IsSortedFunc(spec.Services, byName) {
			t.Errorf("%d Services to attach, want 15 in the order of their names", len(spec.Services))
		}
		return work(spec)
	}
	report, err := Services(t.Context(), Options{
		Services: []int{15}, Variants: []string{Millrace, MillracePacket}, Rounds: 1, RoundTime: 20 * time.Millisecond,
		Attach: map[string]Attach{Millrace: attach, MillracePacket: attach},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{Millrace, MillracePacket} {
		if row := report.Row(name, 15, "", MetricP50(Request)); row == nil || row.Ratio == nil {
			t.Fatalf("%s: no figures; left out: %v", name, report.Skipped)
		}
		for metric, want := range map[string]float64{MetricKernel: 4096, MetricResident: 8192} {
			if row := report.Row(name, 15, "", metric); row == nil || row.Median != want || row.Unit != "bytes" {
				t.Errorf("%s: %s is %+v, want %v bytes", name, metric, row, want)
			}
		}
		if row := report.Row(name, 15, "", MetricLoad); row == nil || row.Rounds != maxLoads {
			t.Errorf("%s: load time is %+v, want the best of %d", name, row, maxLoads)
		}
		if row := report.Row(name, 15, "", MetricChange); row == nil || row.Rounds < 2 {
			t.Errorf("%s: change time is %+v, want at least that of there and back", name, row)
		}
	}
	if attached != 2*maxLoads || closed != attached {
		t.Errorf("attached %d times and closed %d times, want %d", attached, closed, 2*maxLoads)
	}
}

// A change that takes no time because it does nothing must not be reported.
func TestAChangeThatDoesNothingEndsTheRun(t *testing.T) {
	needRoot(t)
	needTools(t)
	var attached, closed int
	work := nftAttach(t, &attached, &closed)
	attach := func(spec AttachSpec) (Attached, error) {
		result, err := work(spec)
		result.Change = func(*model.Service) (time.Duration, error) { return time.Nanosecond, nil }
		return result, err
	}
	_, err := Services(t.Context(), Options{Services: []int{3}, Variants: []string{Millrace}, Attach: map[string]Attach{Millrace: attach}})
	if err == nil || !strings.Contains(err.Error(), "change an endpoint: connect to 10.96.0.12:80: 10.244.2.3:8080 answered, which is not behind it") &&
		!strings.Contains(err.Error(), "of 2 backends never answered") {
		t.Errorf("the run returned %v, want that the endpoint that went still answers", err)
	}
}

// What takes very long to load is left out, unless somebody insists.
func TestLargeRuleSetsAreLeftOut(t *testing.T) {
	needRoot(t)
	needTools(t)
	s := openSession(t, Options{Services: []int{3, 1001, 10_001}, Variants: []string{Nftables, IptablesLegacy}})
	if err := s.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, skipped := range s.report.Skipped {
		out = append(out, skipped.String())
	}
	want := []string{
		"nftables with 1001 Services left out: more than 1000 take it very long to load: say --all-sizes to have it all the same",
		"nftables with 10001 Services left out: more than 1000 take it very long to load: say --all-sizes to have it all the same",
		"iptables-legacy with 10001 Services left out: more than 10000 take it very long to load: say --all-sizes to have it all the same",
	}
	if !slices.Equal(out, want) {
		t.Errorf("left out: %q, want %q", out, want)
	}
}

func TestInsistingLoadsLargeRuleSets(t *testing.T) {
	needRoot(t)
	needTools(t)
	s := openSession(t, Options{Services: []int{1001}, Variants: []string{Nftables}, AllSizes: true})
	if err := s.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(s.cells) != 2 || len(s.report.Skipped) > 0 {
		t.Errorf("%d beds, left out %v, want native and nftables with 1001 Services", len(s.cells), s.report.Skipped)
	}
}

// left wants a variant to be left out for a reason that says all of want.
func left(t *testing.T, o Options, want ...string) {
	t.Helper()
	o.Services, o.Rounds, o.RoundTime = []int{3}, 1, 20*time.Millisecond
	report, err := Services(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Skipped) != 1 || report.Row(Native, 3, "", MetricP50(Connection)) == nil {
		t.Fatalf("left out %v, want one variant; and native measured", report.Skipped)
	}
	for _, part := range want {
		if !strings.Contains(report.Skipped[0].String(), part) {
			t.Errorf("the reason %q does not say %q", report.Skipped[0], part)
		}
	}
}

func TestMissingToolIsNamedWithItsPackage(t *testing.T) {
	needRoot(t)
	t.Setenv("PATH", t.TempDir())
	left(t, Options{Variants: []string{IptablesLegacy}}, "iptables-legacy with 3 Services (last) left out", "iptables-legacy-restore is not installed", "apt-get install iptables")
	left(t, Options{Variants: []string{Nftables}}, "nft is not installed: apt-get install nftables")
}

func TestRefusingToolIsQuoted(t *testing.T) {
	needRoot(t)
	folder := t.TempDir()
	script := "#!/bin/sh\necho \"can't initialize iptables table nat: Table does not exist\" >&2\nexit 3\n"
	if err := os.WriteFile(filepath.Join(folder, "iptables-legacy-restore"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", folder+":"+os.Getenv("PATH"))
	left(t, Options{Variants: []string{IptablesLegacy}}, "exit status 3", "Table does not exist")
}

func TestFailingAttachEndsTheRun(t *testing.T) {
	needRoot(t)
	errNoBTF := errors.New("no BTF")
	refuse := func(AttachSpec) (Attached, error) {
		return Attached{}, fmt.Errorf("load program connect4: %w", errNoBTF)
	}
	_, err := Services(t.Context(), Options{Services: []int{3}, Variants: []string{Millrace}, Attach: map[string]Attach{Millrace: refuse}})
	if !errors.Is(err, errNoBTF) || !strings.Contains(err.Error(), "prepare millrace, 3 Services") {
		t.Errorf("the run returned %v, want the error of the variant under test", err)
	}
}

// What is attached and does not translate must not be measured.
func TestAServiceThatDoesNotAnswerEndsTheRun(t *testing.T) {
	needRoot(t)
	closed := 0
	idle := func(AttachSpec) (Attached, error) { return Attached{Close: func() error { closed++; return nil }}, nil }
	_, err := Services(t.Context(), Options{Services: []int{3}, Variants: []string{Millrace}, Attach: map[string]Attach{Millrace: idle}})
	if err == nil || !strings.Contains(err.Error(), "connect to 10.96.0.") || closed != maxLoads {
		t.Errorf("the run returned %v and detached %d times, want that it could not connect, and %d", err, closed, maxLoads)
	}
}

func TestMissingPrivilegeIsNamed(t *testing.T) {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // and this thread ends with its goroutine
		header, none := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
		err := unix.Capset(&header, &none[0])
		if err == nil {
			_, err = Services(t.Context(), Options{})
		}
		failed <- err
	}()
	var privilege *need.Privilege
	if err := <-failed; !errors.As(err, &privilege) || !slices.Contains(privilege.Capabilities, "CAP_SYS_ADMIN") {
		t.Errorf("without privileges the run returned %v, want that it lacks CAP_SYS_ADMIN", err)
	}
}

// Runs that begin and end at the same time lose no folder, and the last one
// leaves none.
func TestEmptyFoldersGoWithTheLastRun(t *testing.T) {
	above := filepath.Join(t.TempDir(), "millrace")
	folder := filepath.Join(above, "bench")
	var inside atomic.Int32
	// last may remove the folder, and with it the door that others wait at.
	behindDoor := func(act func(string) error, own string, last func(string) error) {
		door, err := openDoor(folder)
		if err != nil {
			t.Error(err)
			return
		}
		defer door.Close()
		if inside.Add(1) != 1 {
			t.Error("two are behind the door")
		}
		err = act(own)
		inside.Add(-1)
		if err := errors.Join(err, last(folder)); err != nil {
			t.Error(err)
		}
	}
	makeOwn := func(path string) error { return os.Mkdir(path, 0o700) }
	stay := func(string) error { return nil }
	var runs sync.WaitGroup
	for i := range 4 {
		own := filepath.Join(folder, strconv.Itoa(i))
		runs.Go(func() {
			for range 300 {
				behindDoor(makeOwn, own, stay)
				behindDoor(os.Remove, own, removeEmpty)
			}
		})
	}
	runs.Wait()
	if _, err := os.Stat(above); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s stays (%v)", above, err)
	}
}

// whenMeasuring calls f once, in the first round.
type whenMeasuring struct {
	f    func()
	done bool
}

func (w *whenMeasuring) Write(line []byte) (int, error) {
	if strings.Contains(string(line), "round 1 of") && !w.done {
		w.done = true
		go w.f()
	}
	return len(line), nil
}

func TestCancelledRunLeavesNothing(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := Services(ctx, Options{Services: []int{3}, Variants: []string{Native}, Rounds: 1 << 30, Progress: &whenMeasuring{f: cancel}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled run returned %v, want context canceled", err)
	}
}

func TestKilledWorkerEndsTheRun(t *testing.T) {
	needRoot(t)
	kill := func() {
		clients, err := cgroup.Processes(filepath.Join(runGroup(t, os.Getpid()), "native-3", "client"))
		if err != nil || len(clients) != 1 {
			t.Errorf("clients are %v (%v), want one", clients, err)
			return
		}
		_ = unix.Kill(clients[0], unix.SIGKILL)
	}
	_, err := Services(t.Context(), Options{Services: []int{3}, Variants: []string{Native}, Rounds: 1 << 30, Progress: &whenMeasuring{f: kill}})
	if err == nil || !strings.Contains(err.Error(), "client of native-3 ended: signal: killed") {
		t.Errorf("the run returned %v, want that the client was killed", err)
	}
}

func TestWorkerThatCannotStartIsQuoted(t *testing.T) {
	needRoot(t)
	_, err := Services(t.Context(), Options{Services: []int{3}, WorkerCommand: []string{"sh", "-c", "echo no such sub-command >&2; exit 64"}})
	if err == nil || !strings.Contains(err.Error(), "no such sub-command") {
		t.Errorf("the run returned %v, want what the worker said", err)
	}
}

// forever is what the killed process of the next test runs.
func forever() int {
	_, err := Services(context.Background(), Options{Services: []int{3}, Variants: []string{Native}, Rounds: 1 << 30, Progress: os.Stdout})
	fmt.Println(err)
	return 1
}

func TestKilledRunIsSweptByTheNext(t *testing.T) {
	needRoot(t)
	bench := exec.Command(os.Args[0], "bench-forever")
	out, err := bench.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := bench.Start(); err != nil {
		t.Fatal(err)
	}
	measuring := make(chan struct{})
	go func() { _, _ = io.Copy(&whenMeasuring{f: func() { close(measuring) }}, out) }()
	<-measuring
	pid := bench.Process.Pid
	workers, err := cgroup.Processes(runGroup(t, pid))
	if err != nil || len(workers) != 2 {
		t.Fatalf("the run has the workers %v (%v), want two", workers, err)
	}

	// As long as it lives, nobody sweeps it.
	left(t, Options{Variants: []string{Millrace}})
	if got := len(leftBy(t, pid)); got != 2+3 {
		t.Fatalf("another run left %v of a living one, want a folder, a cgroup and three namespaces", leftBy(t, pid))
	}

	_ = bench.Process.Kill()
	_ = bench.Wait()
	waitFor(t, "workers end with the run that was killed", func() bool {
		workers, err := cgroup.Processes(runGroup(t, pid))
		return err == nil && len(workers) == 0
	})
	left(t, Options{Variants: []string{Millrace}})
	for _, path := range leftBy(t, pid) {
		t.Errorf("not swept: %s", path)
	}
}

func TestTwoRunsInOneProcessAreRefused(t *testing.T) {
	needRoot(t)
	openSession(t, Options{})
	if _, err := Services(t.Context(), Options{}); err == nil || !strings.Contains(err.Error(), "running a benchmark already") {
		t.Errorf("a second run returned %v", err)
	}
}
