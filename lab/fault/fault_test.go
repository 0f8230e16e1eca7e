package fault

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/test/docs"
)

// The processes that the test binary can be.
const (
	asWorker = "fault-worker"
	asVictim = "fault-victim"
)

// TestMain lets the test binary be the process of a client.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asWorker {
		os.Exit(WorkerMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == asVictim {
		os.Exit(victim())
	}
	os.Exit(m.Run())
}

// Every fault takes, by either family: its application sees what it should, and a
// healthy run sees nothing wrong. Whether it is named is tested with the command.
func TestEveryFaultTakes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	slots := make(chan struct{}, 8)
	var all sync.WaitGroup
	for _, c := range slices.Concat(AsListed(), Variants(), Controls()) {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			take(t, c)
		})
	}
	all.Wait()
}

func take(t *testing.T, c Case) {
	self, err := os.Executable()
	if err != nil {
		t.Error(err)
		return
	}
	stage, err := c.Open(context.Background(), []string{self, asWorker})
	if err != nil {
		t.Error(err)
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	stage.Send(ctx)
	if err := stage.Check(); err != nil {
		t.Error(err)
	}
	t.Logf("%s %s: %s", c.Kind, c.Name(), stage.Outcomes())
	if err := stage.Close(); err != nil {
		t.Error(err)
	}
	noneLeft(t, stage)
}

// A fault that cannot be induced leaves nothing, and says why.
func TestWhatCannotBeInducedLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	impossible := &Fault{Name: "impossible", induce: func(p *Part) error { return p.router.run("false") }}
	stage := &Stage{Case: Of(impossible, false, 1)}
	if err := stage.open(context.Background(), nil); err == nil || !strings.Contains(err.Error(), "run false: exit status 1") {
		t.Errorf("it says: %v", err)
	}
	if err := stage.Close(); err != nil || len(stage.order) != 3 {
		t.Errorf("close: %v, namespaces %v", err, stage.order)
	}
	noneLeft(t, stage)
	absent := &Fault{Name: "absent", needs: []string{"no-such-program"}}
	r := Of(absent, false, 1).Run(context.Background(), nil, time.Second, nil)
	if r.State != NotRun || !strings.Contains(r.Error, "absent needs no-such-program") {
		t.Errorf("a fault whose program is missing: %s, %q", r.State, r.Error)
	}
}

// What a killed process left is removed by the next; what a living one has is not.
func TestWhatAKilledProcessLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	killed := exec.Command(self, asVictim)
	out, err := killed.StdoutPipe()
	if err == nil {
		err = killed.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var left [3]string
	if _, err := fmt.Fscan(out, &left[0], &left[1], &left[2]); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(); err != nil {
		t.Error(err)
	}
	for _, name := range left {
		if _, err := os.Lstat(spacesFolder + "/" + name); err != nil {
			t.Errorf("its process lives: %v", err)
		}
	}
	killed.Process.Kill()
	killed.Wait()
	if err := Sweep(); err != nil {
		t.Error(err)
	}
	for _, name := range left {
		if _, err := os.Lstat(spacesFolder + "/" + name); err == nil {
			t.Errorf("namespace %s is left", name)
		}
	}
}

// victim makes a scene and waits for its end.
func victim() int {
	s, err := newScene(rand.New(rand.NewPCG(rand.Uint64(), 1)), shape{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, at := range s.spaces() {
		fmt.Println(at.name)
	}
	select {}
}

func noneLeft(t *testing.T, stage *Stage) {
	t.Helper()
	for _, name := range stage.Namespaces() {
		if _, err := os.Lstat(spacesFolder + "/" + name); err == nil {
			t.Errorf("%s: namespace %s is left", stage.Name(), name)
		}
	}
}

// A fault that did not take is neither found nor missed.
func TestJudging(t *testing.T) {
	at := func(name, cause, where string) *Part {
		f := &Fault{Name: name}
		if cause != "" {
			f.Causes = []string{cause}
		}
		return &Part{fault: f, blamed: []string{where}, seen: map[Outcome]int{}}
	}
	one := []*Part{at("a", "no-route", "r")}
	for _, row := range []struct {
		name          string
		parts         []*Part
		named         []Named
		missed, wrong int
	}{
		{"named", one, []Named{{Cause: "no-route", Namespace: "r"}}, 0, 0},
		{"named twice", one, []Named{{Cause: "no-route", Namespace: "r"}, {Cause: "no-route", Namespace: "r"}}, 0, 0},
		{"nothing named", one, nil, 1, 0},
		{"elsewhere", one, []Named{{Cause: "no-route", Namespace: "c"}}, 1, 1},
		{"with a false alarm", one, []Named{{Cause: "no-route", Namespace: "r"}, {Cause: "link-down", Namespace: "r"}}, 0, 1},
		{"one of two", []*Part{at("a", "no-route", "r"), at("b", "link-down", "s")}, []Named{{Cause: "no-route", Namespace: "r"}}, 1, 0},
		{"healthy", []*Part{at("h", "", "r")}, nil, 0, 0},
		{"false alarm", []*Part{at("h", "", "r")}, []Named{{Cause: "link-down", Namespace: "r"}}, 0, 1},
	} {
		s := &Stage{parts: row.parts}
		missed, wrong := s.Judge(row.named)
		if len(missed) != row.missed || len(wrong) != row.wrong {
			t.Errorf("%s: missed %v, wrong %v", row.name, missed, wrong)
		}
	}
	quiet := at("q", "no-route", "r")
	quiet.fault.Seen = []Outcome{Timeout}
	quiet.saw(OK)
	if err := quiet.check(); err == nil || !strings.Contains(err.Error(), "saw ok 1, and should have seen [timeout]") {
		t.Errorf("a fault that did not take: %v", err)
	}
	totals := Totals([]*Result{
		{Kind: Listed, State: Right, Found: map[string]bool{"x": true}}, {Kind: Listed, State: Wrong, False: []Named{{}}, Found: map[string]bool{"x": false}},
		{Kind: Listed, State: NotTook}, {Kind: Healthy, State: NotRun},
	})
	if got := fmt.Sprint(totals); got != "[{as listed 2 1 1 1 map[x:1]} {controls 0 0 0 1 map[]}]" {
		t.Errorf("totals: %s", got)
	}
}

// The same seed draws the same runs; every fault comes up; one run of five has two.
func TestDrawing(t *testing.T) {
	names := func(seed uint64) (all []string) {
		for _, c := range Random(seed, 100) {
			all = append(all, fmt.Sprint(c.Name(), c.Seed, c.apart))
		}
		return all
	}
	if !slices.Equal(names(5), names(5)) || slices.Equal(names(5), names(6)) {
		t.Error("a seed does not draw the same runs, or two draw the same")
	}
	seen, pairs := map[string]bool{}, 0
	for _, c := range Random(5, 100) {
		for _, f := range c.Faults {
			seen[f.Name] = true
		}
		if len(c.Faults) == 2 {
			pairs++
			a, b := c.Faults[0], c.Faults[1]
			if !c.apart && (a.whole || b.whole || a.shape != b.shape) {
				t.Errorf("%s: one hides the other", c.Name())
			}
		}
	}
	for _, f := range All() {
		if !f.Control() && !seen[f.Name] {
			t.Errorf("%s is not drawn in 100 runs", f.Name)
		}
	}
	if pairs != 20 {
		t.Errorf("%d pairs in 100 runs", pairs)
	}
}

// What is listed are the 50 that were measured, under names that nobody else has.
func TestTheList(t *testing.T) {
	if n := len(AsListed()); n != 50 {
		t.Errorf("%d faults are listed", n)
	}
	names := map[string]bool{}
	for _, f := range All() {
		if names[f.Name] || f.Says == "" {
			t.Errorf("%q has no name of its own, or says nothing", f.Name)
		}
		names[f.Name] = true
		if found, err := Find(f.Name); err != nil || found != f {
			t.Errorf("%s is not found by its name: %v", f.Name, err)
		}
	}
	if _, err := Find("nonsense"); err == nil || !strings.Contains(err.Error(), "blackhole-route") {
		t.Errorf("a name that no fault has: %v", err)
	}
}

// Checksums are right unless spoiled: a fault of any other kind must not be one of those.
func TestPacketsMadeByHand(t *testing.T) {
	for _, pair := range [][2]string{{"10.1.2.3:1000", "10.9.8.7:80"}, {"[fd00::1]:1000", "[fd01::2]:80"}} {
		from, to := netip.MustParseAddrPort(pair[0]), netip.MustParseAddrPort(pair[1])
		for _, wrong := range []uint16{0, 7} {
			for protocol, packet := range map[byte][]byte{
				unix.IPPROTO_UDP: datagram(from, to, []byte("odd"), wrong),
				unix.IPPROTO_TCP: segment(from, to, synFlag, 9, []byte("even"), wrong),
			} {
				header := 20
				if from.Addr().Is6() {
					header = 40
				} else if sum(0, packet[:20]) != 0xffff {
					t.Errorf("%s: the checksum of the header is wrong", pair[0])
				}
				body := packet[header:]
				pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, protocol}, binary.BigEndian.AppendUint16(nil, uint16(len(body))))
				if right := sum(uint32(sum(0, pseudo)), body) == 0xffff; right != (wrong == 0) {
					t.Errorf("%s, protocol %d, spoiled by %d: right is %v", pair[0], protocol, wrong, right)
				}
			}
		}
	}
}

// The page lists what there is.
func TestListInTheDocumentation(t *testing.T) {
	var b strings.Builder
	b.WriteString("\n| number | name | what it is | cause |\n|---|---|---|---|\n")
	for _, f := range All() {
		cause := "none may be named"
		if !f.Control() {
			cause = "`" + strings.Join(f.Causes, "` or `") + "`"
		}
		fmt.Fprintf(&b, "| %s | `%s` | %s | %s |\n", f.Number, f.Name, f.Says, cause)
	}
	docs.Fresh(t, "../../docs/faults.md", "faults", b.String())
}
