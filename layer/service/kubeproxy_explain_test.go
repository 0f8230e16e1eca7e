package service

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The programs say of every packet of kube-proxy's own tests what kube-proxy does
// with it, but for the rows that give a reason.
func TestProgramsDoWhatKubeProxyDoes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads programs")
	}
	files, err := filepath.Glob("testdata/kube-proxy/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories of kube-proxy: %v", err)
	}
	for _, path := range files {
		stories, err := readFlowStories(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, story := range stories {
			t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar")+"/"+story.name, func(t *testing.T) { story.explain(t) })
		}
	}
}

func (s *flowStory) explain(t *testing.T) {
	snapshot, err := s.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	settings := Settings{Node: snapshot.Nodes[0].Name, Wire: true, NodePortAddresses: s.nodePortAddresses}
	x, err := OpenExplainer(settings, Known{Snapshot: snapshot})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	for _, f := range s.rows {
		want, why := f.want, "as with kube-proxy"
		if f.here != nil {
			want, why = *f.here, f.why
		}
		answer, err := x.Explain(Question{f.protocol, netip.AddrPortFrom(f.source, 0), f.to})
		if err != nil {
			t.Errorf("%s: %v", f.name, err)
			continue
		}
		if got := answer.end(); got.String() != want.String() {
			t.Errorf("%s: %s from %s to %s is %s by %s, and should be %s: %s", f.name, f.protocol, f.source, f.to, got, answer.Path, want, why)
		}
	}
}

// end is the answer in the words of the stories.
func (e *Explanation) end() flowEnd {
	words := map[Verdict]string{Refuse: "refused", Drop: "dropped", NotAService: "not-a-service"}
	end := flowEnd{verdict: words[e.Verdict], masqueraded: e.Masquerade}
	for _, b := range e.Backends {
		end.endpoints = append(end.endpoints, b.Address)
	}
	slices.SortFunc(end.endpoints, netip.AddrPort.Compare)
	return end
}
