package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/test/metrics"
)

// nodes are three that say what sample does, one of them with other numbers, and one that
// does not answer; beside them what was found in their cluster.
func nodes(t *testing.T) *Report {
	t.Helper()
	all := []Answer{}
	for _, name := range []string{"a", "b", "c"} {
		r := sample()
		r.Header.Node, r.Header.Alike = name, map[string]string{"net.core.somaxconn": "4096", "MTU of cni0": "1450"}
		if name == "c" {
			r.Header.Alike["MTU of cni0"] = "1500"
			r.Results[5].Evidence[0].Severity, r.Results[5].Status = "", doctor.OK
		}
		if name == "b" {
			r.Results[2].Evidence = r.Results[2].Evidence[:1]
			r.Results[2].Evidence[0].Value = "7 in 2.0 s, 3.5 a second\x1b[2J"
			r.Results[2].Fix = "less \x1bwork"
		}
		var text bytes.Buffer
		if err := r.JSON(&text); err != nil {
			t.Fatal(err)
		}
		read, err := Read(&text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, Answer{Node: name, Report: read})
	}
	all = append(all, Answer{Node: "d", Err: errors.New("no agent of millrace runs there\n\x1b[2Jat all")})
	checks := doctor.Checks()
	var served *doctor.Check
	for i := range checks {
		if checks[i].ID == "PX-12" {
			served = &checks[i]
		}
	}
	cluster := &Report{
		Header: Header{Tool: "millrace doctor", Version: "v1", Time: time.Unix(1780000000, 0).UTC(), Cluster: "kube:config"},
		Results: []doctor.Result{{Check: served, Status: doctor.Warn, Severity: doctor.Warning, Fix: served.Fix, Undo: served.Undo,
			Evidence: []doctor.Evidence{{Scope: "Service shop/web", Read: "endpointslices.discovery.k8s.io", Value: "0 of 2 endpoints are ready", Severity: doctor.Warning}}}},
	}
	r := Join(all, cluster, true)
	r.Header.Seconds = 2.4
	return r
}

// The screen of several nodes is as in testdata; UPDATE_GOLDEN=1 writes it.
func TestTextOfNodes(t *testing.T) {
	var out bytes.Buffer
	if err := nodes(t).Text(&out, Screen, 2, func(_, text string) string { return text }); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "nodes.txt")
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

// What a node says is one finding with the others', and nothing that it says reaches a
// terminal as it stands.
func TestJoinNodes(t *testing.T) {
	r := nodes(t)
	of := func(id string) doctor.Result {
		for _, result := range r.Results {
			if result.ID == id {
				return result
			}
		}
		t.Fatalf("there is no %s", id)
		return doctor.Result{}
	}
	for id, want := range map[string]string{
		"HS-04": "3 of 3 nodes: a, b, c", "MT-01": "2 of 3 nodes: a, b", "CN-25": "1 of 3 nodes: c", "PX-12": "", "HS-19": "",
	} {
		if got := r.Header.on(of(id)); got != want {
			t.Errorf("%s is on %q, not %q", id, got, want)
		}
	}
	if h := r.Header; h.Node != "" || len(h.Nodes) != 4 || h.Answered() != 3 || h.Namespaces != 36 || h.Cluster != "kube:config" || h.Nodes[3].Error == "" {
		t.Errorf("header %+v", h)
	}
	unseen := strings.Join(r.Header.Unseen, "\n")
	if !strings.Contains(unseen, "node d: no agent of millrace runs there") || !strings.Contains(unseen, "a, b, c: pod k: its sockets") {
		t.Errorf("not seen: %s", unseen)
	}
	var out bytes.Buffer
	if err := r.JSON(&out); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), `\u001b`) || r.Header.Nodes[3].Error != "no agent of millrace runs there; ?[2Jat all" {
		t.Error("what a node says is told as it stands")
	}
	again, err := Read(&out)
	if err != nil || len(again.Results) != len(r.Results) || again.Results[2].Evidence[0].Node == "" {
		t.Errorf("it is not read again: %v", err)
	}
}

// All forms have the nodes.
func TestFormsOfNodes(t *testing.T) {
	r := nodes(t)
	for _, row := range []struct {
		form  func(*bytes.Buffer) error
		wants []string
	}{
		{func(b *bytes.Buffer) error { return r.JSON(b) }, []string{`"format": 2`, `"node": "b"`, `"error": "no agent of millrace runs there; `, `"title": "`, `"pitfall": "`}},
		{func(b *bytes.Buffer) error { return r.JUnit(b) }, []string{"b: pod a: TcpExt.ListenOverflows: 7 in 2.0 s", "c: MTU of cni0: 1500; 2 of 3 nodes have 1450"}},
		{func(b *bytes.Buffer) error { return r.SARIF(b) }, []string{`"name": "a"`, `"name": "c"`, `"name": "kube:config"`}},
		{func(b *bytes.Buffer) error { return r.Prometheus(b) }, []string{`millrace_doctor_node_answered{node="d"} 0`, `millrace_doctor_found_on{id="CN-25",layer="plugin",severity="warning",node="c"} 1`}},
		{func(b *bytes.Buffer) error { return r.WriteHTML(b) }, []string{"3 of 4 nodes; Linux 6.18.44", "<p>3 of 3 nodes: a, b, c</p>", "c: pod a"}},
	} {
		var out bytes.Buffer
		if err := row.form(&out); err != nil {
			t.Fatal(err)
		}
		for _, want := range row.wants {
			if !strings.Contains(out.String(), want) {
				t.Errorf("there is no %s in\n%.3000s", want, out.String())
			}
		}
	}
	var out bytes.Buffer
	if err := r.Prometheus(&out); err != nil {
		t.Fatal(err)
	}
	metrics.Listed(t, "../..", "millrace doctor -o prom", out.String())
	for line := range strings.Lines(out.String()) {
		if !metric.MatchString(strings.TrimSuffix(line, "\n")) {
			t.Errorf("no line of the text format: %q", line)
		}
	}
}

// A baseline of several nodes knows each node's findings.
func TestSinceOfNodes(t *testing.T) {
	var earlier bytes.Buffer
	if err := nodes(t).JSON(&earlier); err != nil {
		t.Fatal(err)
	}
	now := nodes(t)
	for i := range now.Results {
		if now.Results[i].ID == "MT-01" {
			now.Results[i].Evidence = append(now.Results[i].Evidence, doctor.Evidence{Node: "c", Scope: "node", Read: "rtnetlink devices", Value: "vxlan0", Severity: doctor.Warning})
		}
	}
	if err := now.Since(&earlier); err != nil {
		t.Fatal(err)
	}
	if tally := now.Tally(); tally["fail"]+tally["info"] != 0 || tally["warn"] != 1 {
		t.Errorf("%v", tally)
	}
}

func TestReadWhatIsNoReport(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "read report: EOF: is it of `millrace doctor -o json`, whole?",
		`{"header":{"format":1}}`: "format 1 of millrace , and this is format 2: use the same version on both sides",
	} {
		if _, err := Read(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	d := document{Header: Header{Format: Format}, Checks: []check{{ID: "ZZ-99", Title: "of a later version", Status: doctor.Warn, Severity: doctor.Warning, Evidence: []doctor.Evidence{{Scope: "node", Severity: doctor.Warning}}}}}
	text, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Read(bytes.NewReader(text)); err != nil || r.Results[0].Title != "of a later version" {
		t.Errorf("%v", err)
	}
}

// A node that says it has found something, and shows nothing, takes nothing from what the
// others say; a severity that is none is a warning.
func TestJoinWhatNodesMakeUp(t *testing.T) {
	var all []Answer
	for node, says := range map[string]string{
		"a": `{"id":"CT-01","status":"fail","severity":"critical","evidence":[]}`,
		"b": `{"id":"CT-01","status":"ok","evidence":[{"scope":"node","read":"x","value":"y","severity":"critical"}]}`,
		"c": `{"id":"ZZ-99","status":"fail","severity":"\u001b[2J","evidence":[{"severity":"\u001b[2J"}]}`,
	} {
		r, err := Read(strings.NewReader(`{"header":{"format":2},"checks":[` + says + `]}`))
		all = append(all, Answer{Node: node, Report: r, Err: err})
	}
	r := Join(all, &Report{}, false)
	if len(r.Results) != 2 || r.Header.Answered() != 3 {
		t.Fatalf("%+v", r)
	}
	if one := r.Results[0]; one.Status != doctor.Fail || r.Header.on(one) != "1 of 3 nodes: b" {
		t.Errorf("%s is %s on %s", one.ID, one.Status, r.Header.on(one))
	}
	if one := r.Results[1]; one.Status != doctor.Warn || one.Severity != doctor.Warning || one.Check.Severity != doctor.Warning {
		t.Errorf("%s is %s, %q, %q", one.ID, one.Status, one.Severity, one.Check.Severity)
	}
}
