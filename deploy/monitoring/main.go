// Command monitoring writes what is made from something else in this folder: the
// dashboard from panels.go, and the PrometheusRule from millrace.rules.yaml.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

//go:generate go run .

// The files of this folder, what is made and what it is made of.
const (
	rulesFile     = "millrace.rules.yaml"
	objectFile    = "prometheusrule.yaml"
	dashboardFile = "dashboard.json"
)

func main() {
	made, err := made()
	for name, content := range made {
		if err == nil {
			err = os.WriteFile(name, content, 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "monitoring:", err)
		os.Exit(1)
	}
}

// made are the files that are made, by name.
func made() (map[string][]byte, error) {
	rules, err := os.ReadFile(rulesFile)
	if err != nil {
		return nil, err
	}
	var page bytes.Buffer
	encoder := json.NewEncoder(&page)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(board()); err != nil {
		return nil, err
	}
	return map[string][]byte{objectFile: object(rules), dashboardFile: page.Bytes()}, nil
}

const objectHead = `# The rules of millrace.rules.yaml for the Prometheus operator. Made by: go generate
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: millrace
  namespace: kube-system
  labels: {app.kubernetes.io/name: millrace}
spec:
`

// object is the rules in the operator's manifest: the same text, further in.
func object(rules []byte) []byte {
	var b bytes.Buffer
	b.WriteString(objectHead)
	_, groups, _ := strings.Cut(string(rules), "\ngroups:\n")
	for line := range strings.Lines("groups:\n" + groups) {
		if line != "\n" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	return b.Bytes()
}
