package report

import (
	"cmp"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"strings"

	"github.com/millrace/millrace/doctor"
)

// lines are the evidence of a result, one line each.
func lines(r doctor.Result) string {
	var all []string
	for _, e := range r.Evidence {
		all = append(all, fmt.Sprintf("%s: %s: %s", where(e), e.Read, e.Value))
	}
	return strings.Join(all, "\n")
}

type suites struct {
	XMLName xml.Name `xml:"testsuites"`
	Suites  []*suite `xml:"testsuite"`
}

type suite struct {
	Name     string     `xml:"name,attr"`
	Tests    int        `xml:"tests,attr"`
	Failures int        `xml:"failures,attr"`
	Skipped  int        `xml:"skipped,attr"`
	Time     string     `xml:"timestamp,attr"`
	Cases    []testCase `xml:"testcase"`
}

type testCase struct {
	Class   string   `xml:"classname,attr"`
	Name    string   `xml:"name,attr"`
	Failure *outcome `xml:"failure"`
	Skipped *outcome `xml:"skipped"`
	Output  string   `xml:"system-out,omitempty"`
}

type outcome struct {
	Message string `xml:"message,attr"`
	Kind    string `xml:"type,attr,omitempty"`
	Text    string `xml:",chardata"`
}

// JUnit writes a suite for each layer and a case for each check. A finding is a failure,
// but for information, which is the case's output.
func (r *Report) JUnit(w io.Writer) error {
	var all suites
	byLayer := map[string]*suite{}
	for _, result := range r.Results {
		s := byLayer[result.Layer]
		if s == nil {
			s = &suite{Name: result.Layer, Time: r.Header.Time.UTC().Format("2006-01-02T15:04:05")}
			byLayer[result.Layer] = s
			all.Suites = append(all.Suites, s)
		}
		c := testCase{Class: "millrace.doctor." + result.Layer, Name: result.ID + " " + result.Title}
		switch word(result) {
		case "fail", "warn":
			s.Failures++
			c.Failure = &outcome{result.Title, string(result.Severity), lines(result) + "\nfix: " + result.Fix}
		case "skip":
			s.Skipped++
			c.Skipped = &outcome{Message: lines(result)}
		case "info":
			c.Output = lines(result) + "\nfix: " + result.Fix
		}
		s.Tests++
		s.Cases = append(s.Cases, c)
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	encoder := xml.NewEncoder(w)
	encoder.Indent("", "  ")
	if err := encoder.Encode(all); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}

type object = map[string]any

var sarifLevels = map[doctor.Severity]string{doctor.Critical: "error", doctor.Warning: "warning", doctor.Info: "note"}

// SARIF writes version 2.1.0: a rule for each check, a result for each finding, and a
// notification for what was skipped.
func (r *Report) SARIF(w io.Writer) error {
	rules, results, notes := []object{}, []object{}, []object{}
	for i, result := range r.Results {
		rules = append(rules, object{
			"id": result.ID, "shortDescription": object{"text": result.Title}, "fullDescription": object{"text": result.Effect},
			"help":                 object{"text": result.Fix + "\n" + result.Source},
			"defaultConfiguration": object{"level": sarifLevels[result.Check.Severity]},
		})
		switch {
		case found(result):
			results = append(results, object{
				"ruleId": result.ID, "ruleIndex": i, "level": sarifLevels[result.Severity],
				"message":   object{"text": result.Title + "\n" + lines(result) + "\nfix: " + result.Fix},
				"locations": r.locations(result),
			})
		case result.Status == doctor.Skip:
			notes = append(notes, object{
				"level": "note", "associatedRule": object{"id": result.ID, "index": i}, "message": object{"text": lines(result)},
			})
		}
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(object{
		"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0",
		"runs": []object{{
			"tool":        object{"driver": object{"name": "millrace doctor", "semanticVersion": r.Header.Version, "rules": rules}},
			"invocations": []object{{"executionSuccessful": true, "toolExecutionNotifications": notes}},
			"results":     results,
		}},
	})
}

// locations are the nodes on which something was found, or what was looked at.
func (r *Report) locations(result doctor.Result) (all []object) {
	names := nodesOf(result)
	if len(names) == 0 {
		names = []string{cmp.Or(r.Header.Node, r.Header.Cluster)}
	}
	for _, name := range names {
		all = append(all, object{"logicalLocations": []object{{"name": name, "kind": "resource"}}})
	}
	return all
}

// Prometheus writes the text format, as node_exporter's textfile collector takes it.
func (r *Report) Prometheus(w io.Writer) error {
	var b strings.Builder
	gauge := func(name, help string, value float64) {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s gauge\n%s %g\n", name, help, name, name, value)
	}
	b.WriteString("# HELP millrace_doctor_check What a check came to: the line of its status is 1.\n# TYPE millrace_doctor_check gauge\n")
	for _, result := range r.Results {
		for _, status := range []doctor.Status{doctor.OK, doctor.Warn, doctor.Fail, doctor.Skip} {
			value := 0
			if result.Status == status {
				value = 1
			}
			fmt.Fprintf(&b, "millrace_doctor_check{id=%q,layer=%q,severity=%q,status=%q} %d\n", result.ID, result.Layer, result.Check.Severity, status, value)
		}
	}
	r.nodeMetrics(&b)
	gauge("millrace_doctor_namespaces", "Network namespaces that were read.", float64(r.Header.Namespaces))
	gauge("millrace_doctor_seconds", "How long the examination took.", r.Header.Seconds)
	gauge("millrace_doctor_timestamp_seconds", "When it began, in Unix time.", float64(r.Header.Time.Unix()))
	_, err := io.WriteString(w, b.String())
	return err
}

// nodeMetrics say, where several nodes were to be looked at, which have answered, and on
// which something was found.
func (r *Report) nodeMetrics(b *strings.Builder) {
	if len(r.Header.Nodes) == 0 {
		return
	}
	b.WriteString("# HELP millrace_doctor_node_answered Whether a node that was asked has answered.\n# TYPE millrace_doctor_node_answered gauge\n")
	for _, n := range r.Header.Nodes {
		value := 1
		if n.Error != "" {
			value = 0
		}
		fmt.Fprintf(b, "millrace_doctor_node_answered{node=%q} %d\n", n.Name, value)
	}
	b.WriteString("# HELP millrace_doctor_found_on What a check found on a node: 1.\n# TYPE millrace_doctor_found_on gauge\n")
	for _, result := range r.Results {
		for _, name := range nodesOf(result) {
			fmt.Fprintf(b, "millrace_doctor_found_on{id=%q,layer=%q,severity=%q,node=%q} 1\n", result.ID, result.Layer, result.Severity, name)
		}
	}
}
