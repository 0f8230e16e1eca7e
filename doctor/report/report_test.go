package report

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/millrace/millrace/doctor"
	testpage "github.com/millrace/millrace/test/page"
)

// sample has a result of each kind.
func sample() *Report {
	check := func(id string) *doctor.Check {
		all := doctor.Checks()
		return &all[slices.IndexFunc(all, func(c doctor.Check) bool { return c.ID == id })]
	}
	result := func(id string, status doctor.Status, severity doctor.Severity, evidence ...doctor.Evidence) doctor.Result {
		c := check(id)
		return doctor.Result{Check: c, Status: status, Severity: severity, Evidence: evidence, Fix: c.Fix, Undo: c.Undo}
	}
	var many []doctor.Evidence
	for _, pod := range []string{"pod a", "pod b", "pod c"} {
		many = append(many, doctor.Evidence{Scope: pod, Read: "TcpExt.ListenOverflows", Value: "41 in 2.0 s, 20.5 a second", Severity: doctor.Critical})
	}
	lack := doctor.Evidence{Scope: "node", Read: "net.netfilter.nf_conntrack_count", Value: "there is no connection tracking in this kernel, or it is not loaded", Unread: true}
	return &Report{
		Header: Header{Tool: "millrace doctor", Version: "v1", Node: "node-1", Kernel: "6.18.44", Time: time.Unix(1780000000, 0).UTC(), Seconds: 2.3, Window: 2, Namespaces: 12, Unseen: []string{"pod k: its sockets are in the kernel of firecracker"}},
		Results: []doctor.Result{
			result("CT-01", doctor.Skip, doctor.Critical, lack),
			result("CT-04", doctor.Skip, doctor.Critical, lack),
			result("HS-04", doctor.Fail, doctor.Critical, many...),
			result("HS-05", doctor.Warn, doctor.Info, doctor.Evidence{Scope: "pod <a> & \"b\"", Read: "net.core.somaxconn", Value: "128", Severity: doctor.Info}),
			result("HS-19", doctor.OK, doctor.Critical, doctor.Evidence{Scope: "node", Read: "/proc/net/stat/arp_cache", Value: "30 entries of 1024"}),
			result("MT-01", doctor.Warn, doctor.Warning, doctor.Evidence{Scope: "node", Read: "rtnetlink devices", Value: "vxlan0 (vxlan) 1500 + 50, and eth0 below it 1500", Severity: doctor.Warning}),
		},
	}
}

// The fields are a promise: nothing is missing and nothing is more.
func TestJSON(t *testing.T) {
	var out bytes.Buffer
	if err := sample().JSON(&out); err != nil {
		t.Fatal(err)
	}
	var got map[string]json.RawMessage
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if keys := slices.Sorted(maps.Keys(got)); !slices.Equal(keys, []string{"checks", "header"}) {
		t.Errorf("fields %q", keys)
	}
	var checks []map[string]any
	if err := json.Unmarshal(got["checks"], &checks); err != nil || len(checks) != 6 {
		t.Fatalf("%d checks: %v", len(checks), err)
	}
	want := []string{"effect", "evidence", "fix", "id", "layer", "pitfall", "severity", "source", "status", "title", "undo"}
	for _, c := range checks {
		if keys := slices.Sorted(maps.Keys(c)); !slices.Equal(keys, want) {
			t.Errorf("fields %q, not %q", keys, want)
		}
	}
	evidence := checks[2]["evidence"].([]any)
	if first := evidence[0].(map[string]any); len(evidence) != 3 || len(first) != 4 || first["severity"] != "critical" || first["scope"] != "pod a" || first["value"] != "41 in 2.0 s, 20.5 a second" {
		t.Errorf("evidence %v", evidence)
	}
}

func TestJUnit(t *testing.T) {
	var out bytes.Buffer
	if err := sample().JUnit(&out); err != nil {
		t.Fatal(err)
	}
	var got suites
	if err := xml.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	var tests, failures, skipped int
	for _, s := range got.Suites {
		tests, failures, skipped = tests+s.Tests, failures+s.Failures, skipped+s.Skipped
	}
	if tests != 6 || failures != 2 || skipped != 2 {
		t.Errorf("%d tests, %d failures, %d skipped; not 6, 2, 2", tests, failures, skipped)
	}
	if !strings.Contains(out.String(), "pod a: TcpExt.ListenOverflows: 41 in 2.0 s") || !strings.Contains(out.String(), `pod &lt;a&gt; &amp;`) {
		t.Error(out.String())
	}
}

func TestSARIF(t *testing.T) {
	var out bytes.Buffer
	if err := sample().SARIF(&out); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Version string
		Runs    []struct {
			Tool struct {
				Driver struct{ Rules []struct{ ID string } }
			}
			Results []struct {
				RuleID    string
				RuleIndex int
				Level     string
			}
			Invocations []struct{ ToolExecutionNotifications []any }
		}
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.Version != "2.1.0" || len(got.Runs) != 1 {
		t.Fatalf("%v in %s", err, out.String())
	}
	run, levels := got.Runs[0], ""
	for _, r := range run.Results {
		levels += r.RuleID + " " + r.Level + ", "
		if run.Tool.Driver.Rules[r.RuleIndex].ID != r.RuleID {
			t.Errorf("rule %d is not %s", r.RuleIndex, r.RuleID)
		}
	}
	if levels != "HS-04 error, HS-05 note, MT-01 warning, " || len(run.Invocations[0].ToolExecutionNotifications) != 2 {
		t.Errorf("results %s; %d notifications", levels, len(run.Invocations[0].ToolExecutionNotifications))
	}
}

var metric = regexp.MustCompile(`^(# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{([a-z]+="[^"\\\n]*",?)+\})? [0-9.e+-]+)$`)

func TestPrometheus(t *testing.T) {
	var out bytes.Buffer
	if err := sample().Prometheus(&out); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if !metric.MatchString(strings.TrimSuffix(line, "\n")) {
			t.Errorf("no line of the text format: %q", line)
		}
	}
	for _, want := range []string{
		`millrace_doctor_check{id="HS-04",layer="sockets",severity="critical",status="fail"} 1`,
		`millrace_doctor_check{id="HS-04",layer="sockets",severity="critical",status="ok"} 0`,
		"millrace_doctor_timestamp_seconds 1.78e+09",
	} {
		if !strings.Contains(out.String(), want+"\n") {
			t.Errorf("no line %s in\n%s", want, out.String())
		}
	}
}

// The screen is as in testdata; UPDATE_GOLDEN=1 writes it.
func TestText(t *testing.T) {
	var out bytes.Buffer
	plain := func(_, text string) string { return text }
	if err := sample().Text(&out, Screen, 2, plain); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "screen.txt")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || out.String() != string(want) {
		t.Errorf("the screen differs (%v):\n%s", err, out.String())
	}
}

// On a narrow terminal no line is longer than it, but for a word that is.
func TestTextOnANarrowTerminal(t *testing.T) {
	r := sample()
	r.Header.Unseen = []string{strings.Repeat("a process that this one may not look at ", 4)}
	r.Header.Known, r.Header.Cluster = 3, "kube:/etc/kubernetes/admin.conf"
	var wide, narrow bytes.Buffer
	for columns, out := range map[int]*bytes.Buffer{Screen: &wide, 70: &narrow} {
		if err := r.Text(out, columns, 2, func(_, text string) string { return text }); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			line = strings.TrimRight(line, "\n")
			if columns < Screen && utf8.RuneCountInString(line) > columns && strings.Contains(strings.TrimLeft(strings.Replace(line, "ref", "", 1), " "), " ") {
				t.Errorf("more than %d columns: %q", columns, line)
			}
		}
	}
	if got, want := strings.Fields(narrow.String()), strings.Fields(wide.String()); !slices.Equal(got, want) {
		t.Errorf("it says something else:\n%s", narrow.String())
	}
}

// What was there before is left out, and what is new is not, in a check that had some.
func TestSince(t *testing.T) {
	var earlier bytes.Buffer
	if err := sample().JSON(&earlier); err != nil {
		t.Fatal(err)
	}
	baseline := earlier.String()
	now := sample()
	if err := now.Since(strings.NewReader(baseline)); err != nil {
		t.Fatal(err)
	}
	if tally := now.Tally(); tally["fail"]+tally["warn"]+tally["info"] != 0 || tally["ok"] != 4 || now.Header.Known != 3 {
		t.Errorf("%v, known %d", tally, now.Header.Known)
	}
	now = sample()
	fails := &now.Results[2]
	fails.Evidence[0].Value = "7 in 2.0 s" // another number is the same finding
	fails.Evidence = append(fails.Evidence, doctor.Evidence{Scope: "pod new", Read: "TcpExt.ListenOverflows", Value: "1 in 2.0 s", Severity: doctor.Critical})
	if err := now.Since(strings.NewReader(baseline)); err != nil {
		t.Fatal(err)
	}
	if r := now.Results[2]; r.Status != doctor.Fail || len(r.Evidence) != 1 || r.Evidence[0].Scope != "pod new" {
		t.Errorf("%s: %v", r.Status, r.Evidence)
	}
	if err := now.Since(strings.NewReader("# not JSON")); err == nil {
		t.Error("no baseline and no error")
	}
}

func TestExplain(t *testing.T) {
	for _, c := range doctor.Checks() {
		var out bytes.Buffer
		if err := Explain(&out, Screen, c); err != nil {
			t.Fatal(err)
		}
		text := strings.Join(strings.Fields(out.String()), " ")
		for _, part := range []string{c.ID, c.Title, c.When, c.Effect, c.Fix, c.Undo, c.Pitfall, c.Source} {
			if !strings.Contains(text, part) {
				t.Errorf("%s: %q is missing in\n%s", c.ID, part, out.String())
			}
		}
	}
}

// The page needs nothing else, all evidence of what was found is in it, and what was read
// on the node stays text.
func TestPage(t *testing.T) {
	var out bytes.Buffer
	r := sample()
	if err := r.WriteHTML(&out); err != nil {
		t.Fatal(err)
	}
	page := out.String()
	if count := testpage.Alone(t, page); count["section"] != 3 || count["table"] != 4 {
		t.Errorf("%d findings in %d tables, not 3 in 4", count["section"], count["table"])
	}
	for _, want := range []string{
		"2 things to mend", "<strong>1</strong>traffic is or will be lost", "pod a, pod b, pod c", `pod &lt;a&gt; &amp; &#34;b&#34;`,
		"CT-01, CT-04: node: net.netfilter.nf_conntrack_count: there is no connection tracking",
		"pod k: its sockets are in the kernel of firecracker", `id="HS-04"`, r.Results[2].Fix,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Index(page, `id="HS-04"`) > strings.Index(page, `id="MT-01"`) {
		t.Error("the worst is not the first")
	}
}
