package bench

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// Settings with an effect that can be measured, in both directions: what is better is
// kept, what is worse is called harmful, and what is alike has no effect.
func TestProve(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	for _, row := range []struct {
		load    Load
		setting string
		a, b    string
		want    Verdict
	}{
		{BurstOfConnections, "net.core.somaxconn", "128", "4096", Keeps},
		{BurstOfConnections, "net.core.somaxconn", "4096", "16", Harmful},
		{BurstOfConnections, "net.core.somaxconn", "512", "512", NoEffect},
		{BurstOfDatagrams, "net.core.rmem_default", "212992", "4194304", Keeps},
		{BurstOfDatagrams, "net.core.rmem_default", "212992", "8192", Harmful},
		{BurstOfDatagrams, "net.core.rmem_default", "212992", "212992", NoEffect},
	} {
		p, err := Prove(t.Context(), ProveOptions{Load: row.load, Setting: row.setting, A: row.a, B: row.b, Rounds: minRounds})
		if err != nil {
			t.Errorf("%s %s -> %s: %v", row.setting, row.a, row.b, err)
			continue
		}
		t.Log(p)
		if p.Verdict != row.want || !strings.HasPrefix(p.String(), string(row.want)+": ") {
			t.Errorf("want %s: %s", row.want, p)
		}
	}
}

// A table that is full, and one with twice the room.
func TestProveFullTable(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	p, err := Prove(t.Context(), ProveOptions{Load: FullTable, Setting: "net.netfilter.nf_conntrack_max", A: "262144", B: "524288", Rounds: minRounds})
	if err != nil {
		t.Fatal(err)
	}
	if t.Log(p); p.Verdict != Keeps || p.MedianA != free || p.MedianB != newConnections {
		t.Errorf("want %s, %d and %d connections", Keeps, free, newConnections)
	}
}

// The middle and the interval decide, not one round.
func TestVerdicts(t *testing.T) {
	o := ProveOptions{Load: Connections, Rounds: 8}
	for want, rows := range map[Verdict][][]float64{
		Keeps:    {{1.02, 1.05, 1.03, 1.2, 1.04, 1.06, 1.03, 1.02}},
		Harmful:  {{0.9, 0.95, 0.91, 0.5, 0.98, 0.97, 0.9, 0.94}},
		NoEffect: {{0.9, 1.2, 1, 1.1, 0.8, 1, 1.3, 1}, {1.005, 1.006, 1.005, 1.008, 1.004, 1.005, 1.007, 1.006}, {0.995, 0.994, 0.993, 0.995, 0.996, 0.995, 0.994, 0.993}},
	} {
		for _, row := range rows {
			p, err := o.judge([2][]float64{{1, 1, 1, 1, 1, 1, 1, 1}, row})
			if err != nil || p.Verdict != want {
				t.Errorf("%v: %+v, %v; want %s", row, p, err, want)
			}
		}
	}
	if _, err := o.judge([2][]float64{{0, 1}, {1, 1}}); err == nil {
		t.Error("a ratio to nothing")
	}
}

func TestProveRefuses(t *testing.T) {
	for what, o := range map[string]ProveOptions{
		"rounds":   {Load: BurstOfConnections, Setting: "net.core.somaxconn", A: "1", B: "2", Rounds: 3},
		"load":     {Load: "nonsense", A: "1", B: "2"},
		"numbers":  {Load: BurstOfDatagrams, A: "many", B: "2"},
		"too many": {Load: BurstOfConnections, Setting: "net.core.somaxconn", A: "8192", B: "16384"},
		"zero":     {Load: BurstOfDatagrams, A: "0", B: "2"},
		"nonsense": {Load: Connections, Setting: "net.ipv4.absent", A: "1", B: "2"},
	} {
		if os.Geteuid() != 0 && what != "rounds" {
			continue
		}
		_, err := Prove(t.Context(), o)
		if err == nil || what != "nonsense" && !errors.Is(err, ErrOptions) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if left, _ := os.ReadDir(runsFolder); len(left) > 0 {
		for _, f := range left {
			if f.Name() == pid() {
				t.Error("the run's folder is left")
			}
		}
	}
}

func pid() string { return strconv.Itoa(os.Getpid()) }
