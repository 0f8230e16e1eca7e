package tune

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
)

// fight is why a setting is left to somebody else.
type fight struct {
	netns string
	row   Row
}

// Error says who it might be, as far as that can be seen now.
func (f *fight) Error() string {
	return fmt.Sprintf("it was set to %s %d times within %v, and each time somebody set it to something else again: now it is left to them%s",
		f.row.wrote, timesMended, mendedWithin, suspects(f.netns, f.row.Name))
}

// suspects are those who might set a setting of connection tracking, " (...)", or
// nothing.
func suspects(netns, name string) string {
	var found []string
	if process, err := kubeproxy.Running(netns); err == nil && process > 0 {
		found = append(found, fmt.Sprintf("process %d is a kube-proxy", process))
	}
	for _, file := range sysctl.Files(name) {
		found = append(found, file+" sets it")
	}
	if len(found) == 0 {
		return ""
	}
	return " (" + strings.Join(found, ", ") + ")"
}

// Describe implements layer.Layer.
func (l *Layer) Describe() (layer.Description, error) {
	d := layer.Description{Name: l.Name(), Objects: l.inForce.Len(), Values: l.inForce.Values()}
	asked := plan(l.settings)
	why := maps.Clone(l.refused)
	for _, r := range asked.rows {
		if err := l.unread[r.Name]; err != nil && why[r.Name] == nil {
			why[r.Name] = err
		}
	}
	// One sentence for each reason, not for each setting.
	names := map[[2]string][]string{}
	for _, name := range slices.Sorted(maps.Keys(why)) {
		what := "not as it was before millrace"
		if asked.row(name) != nil {
			what = "not as " + l.settings.From + " asks"
		}
		sentence := [2]string{what, errors.Unwrap(why[name]).Error()}
		names[sentence] = append(names[sentence], name)
	}
	for sentence, of := range names {
		d.Degraded = append(d.Degraded, sentence[0]+": "+strings.Join(of, ", ")+": "+sentence[1])
	}
	slices.Sort(d.Degraded)
	return d, nil
}
