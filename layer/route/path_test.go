package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/probe"
)

// A measurement that ends without a result says nothing against an earlier one; what an
// earlier process left is believed until somebody looked, and kept if nothing is heard
// because packets come and go.
func TestWhatIsKnownOfPaths(t *testing.T) {
	to, device := netip.MustParseAddr("192.0.2.2"), 2
	var answer probe.Path
	var failed error
	p := newPaths("")
	p.mtu = func(_ context.Context, _ string, _ netip.Addr, most int) (probe.Path, error) {
		answer.Tried = most
		return answer, failed
	}
	picture := newPicture()
	picture.facts = segment()
	row := &Row{To: netip.MustParsePrefix("10.244.2.0/24"), Via: to, Direct: true, index: device, set: 1350}
	picture.rows[row.To] = row
	picture.measure()
	p.takeOver(picture)
	passed := func(n int) func() { return func() { answer, failed = probe.Path{Passed: n}, nil } }
	fails := func(err error) func() { return func() { answer, failed = probe.Path{}, err } }
	mtu := func(n int) func() {
		return func() { picture.facts.devices[device] = fact{name: "eth0", mtu: n, ethernet: true} }
	}
	for _, step := range []struct {
		what   string
		do     func()
		differ bool
		narrow int
	}{
		{"an earlier process' is believed, if nothing can be sent", fails(fmt.Errorf("open a socket: %w", probe.ErrUnsent)), false, 1350},
		{"and while answers come and go", fails(errors.New("answers come and go")), false, 1350},
		{"and forgotten, if nobody answers", fails(probe.ErrSilent), true, 0},
		{"all passes", passed(1500), false, 0},
		{"less passes", passed(1400), true, 1400},
		{"still", passed(1400), false, 1400},
		{"a router says so now", func() { answer, failed = probe.Path{Passed: 1400, Announced: 1400}, nil }, true, 1400},
		{"the node is off", fails(probe.ErrSilent), false, 1400},
		{"it may be measured again", passed(1380), true, 1380},
		{"the uplink takes less by itself", func() { mtu(1300)(); passed(1300)() }, true, 0},
	} {
		step.do()
		p.aim(picture)
		if differ := p.measure(t.Context(), p.due(true)); differ != step.differ || p.all()[to].narrow() != step.narrow {
			t.Errorf("%s: differs: %v; known is %+v", step.what, differ, p.all()[to])
		}
	}
	if due := p.due(false); len(due) > 0 {
		t.Errorf("measured, and still to do: %v", due)
	}
	mtu(9000)()
	p.aim(picture)
	if due := p.due(false); fmt.Sprint(due) != "[192.0.2.2]" || len(p.news) != 1 {
		t.Errorf("the uplink takes more, and to be measured is %v", due)
	}
	delete(picture.rows, row.To)
	p.aim(picture)
	if len(p.all()) > 0 || p.learn(to, measurement{Path: probe.Path{Tried: 9000, Passed: 1400}, most: 9000}, nil) {
		t.Errorf("the node has gone, and known is %v", p.all())
	}
}

// Measuring ends when all that it began has, also where it is to end early.
func TestMeasuringWaits(t *testing.T) {
	p := newPaths("")
	var running atomic.Int32
	ctx, end := context.WithCancel(t.Context())
	p.mtu = func(ctx context.Context, _ string, _ netip.Addr, _ int) (probe.Path, error) {
		if running.Add(1) == pathsAtOnce {
			end()
		}
		defer running.Add(-1)
		<-ctx.Done()
		time.Sleep(20 * time.Millisecond)
		return probe.Path{}, ctx.Err()
	}
	for i := range byte(3 * pathsAtOnce) {
		p.aims[netip.AddrFrom4([4]byte{192, 0, 2, i})] = aim{most: 1500}
	}
	if p.measure(ctx, p.due(true)) || running.Load() > 0 {
		t.Errorf("it ended, and %d measurements run", running.Load())
	}
}

// An agent with the capabilities of the manifest for the pod network measures. One that may
// not open raw sockets says so, and changes nothing of what the one before it had measured.
func TestPathsWithoutRawSockets(t *testing.T) {
	v := newValley(t, ModeVXLAN, false)
	must(t, v.layers[0].Close())
	v.silence(true)
	all := installed(t)
	for _, row := range []struct {
		what         string
		capabilities []uintptr
		passes, mtu  int
		says         string
	}{
		{"as installed", all, 1400, 1350, "packets of at most 1400 bytes pass to node n2 (192.0.2.2)"},
		{"without CAP_NET_RAW", slices.DeleteFunc(slices.Clone(all), func(c uintptr) bool { return c == unix.CAP_NET_RAW }), 1380, 1350,
			"how long packets to other nodes may be is not measured, of 1 (the first is 192.0.2.2): open a raw socket, which takes CAP_NET_RAW: operation not permitted"},
		{"as installed again", all, 1380, 1330, "packets of at most 1380 bytes pass to node n2 (192.0.2.2)"},
	} {
		v.takes(row.passes)
		said, err := v.asAgent(row.capabilities)
		if err != nil || !strings.Contains(said, row.says) || strings.Contains(said, "not measured") != strings.Contains(row.says, "not measured") {
			t.Errorf("%s: %v, not %q\n%s", row.what, err, row.says, said)
		}
		v.sh(v.nodes[0], fmt.Sprintf("ip route show proto 110 10.244.2.0/24 | grep -qw 'mtu %d'", row.mtu))
	}
}

// installed are the capabilities that deploy/millrace.yaml gives the agent of the pod
// network.
func installed(t *testing.T) (all []uintptr) {
	t.Helper()
	manifest, err := os.ReadFile(filepath.Join("..", "..", "deploy", "millrace.yaml"))
	must(t, err)
	_, list, found := strings.Cut(strings.ReplaceAll(string(manifest), "# pods: ", ""), "drop: [ALL]\n              add:\n")
	numbers := map[string]uintptr{"BPF": unix.CAP_BPF, "PERFMON": unix.CAP_PERFMON, "NET_ADMIN": unix.CAP_NET_ADMIN, "SYS_ADMIN": unix.CAP_SYS_ADMIN,
		"SYS_PTRACE": unix.CAP_SYS_PTRACE, "SYSLOG": unix.CAP_SYSLOG, "NET_RAW": unix.CAP_NET_RAW}
	for line := range strings.Lines(list) {
		name, item := strings.CutPrefix(strings.TrimSpace(line), "- ")
		if !item {
			break
		}
		number, known := numbers[name]
		found = found && known
		all = append(all, number)
	}
	if !found || len(all) == 0 {
		t.Fatalf("the manifest gives capabilities that are not understood:\n%.200s", list)
	}
	return all
}

// asAgent runs TestAsAgent on node 1 in a process that has these capabilities alone.
func (v *valley) asAgent(capabilities []uintptr) (said string, err error) {
	c := exec.Command(os.Args[0], "-test.run", "^TestAsAgent$", "-test.v")
	c.Env = append(os.Environ(), "AS_AGENT="+v.nodes[0], "PINS="+v.settings[0].Pins)
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: whatever it starts from now on lacks the others
		for one := range uintptr(unix.CAP_LAST_CAP + 1) {
			if slices.Contains(capabilities, one) {
				continue
			}
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, one, 0, 0, 0); err != nil {
				ended <- err
				return
			}
		}
		text, err := c.CombinedOutput()
		said = string(text)
		ended <- err
	}()
	err = <-ended
	return said, err
}

// TestAsAgent is that process: it measures, twice in case an answer was late, and
// applies what it found.
func TestAsAgent(t *testing.T) {
	space := os.Getenv("AS_AGENT")
	if space == "" {
		return
	}
	v := &valley{village: &village{t: t}}
	v.settings[0] = Settings{Node: "n1", Mode: ModeVXLAN, Netns: space, Pins: os.Getenv("PINS")}
	l := v.start(0)
	v.layers[0] = l
	for range 2 {
		l.paths.measure(t.Context(), l.paths.due(true))
		v.refresh(0)
	}
	d, err := l.Describe()
	must(t, err)
	t.Log(strings.Join(d.Degraded, "\n"))
}
