package kube

import (
	"encoding/json"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// mark is a label or annotation by which a tool knows its objects.
type mark struct {
	key, who, where string
	// value is the only one that counts, "" for any.
	value string
}

// marks are those of tools that put back what others change of their objects:
// https://argo-cd.readthedocs.io/en/stable/user-guide/resource_tracking/,
// https://fluxcd.io/flux/components/kustomize/kustomizations/,
// https://github.com/fluxcd/helm-controller/pull/238,
// https://github.com/kubernetes/kubernetes/blob/master/cluster/addons/addon-manager/README.md,
// https://helm.sh/docs/chart_best_practices/labels/,
// https://kubernetes.io/docs/reference/labels-annotations-taints/.
var marks = []mark{
	{key: "argocd.argoproj.io/tracking-id", who: "Argo CD", where: "in the repository of that application"},
	{key: "argocd.argoproj.io/instance", who: "Argo CD", where: "in the repository of that application"},
	{key: "kustomize.toolkit.fluxcd.io/name", who: "Flux", where: "in the repository of that Kustomization"},
	{key: "helm.toolkit.fluxcd.io/name", who: "Flux", where: "in the values of that HelmRelease"},
	{key: "meta.helm.sh/release-name", who: "Helm", where: "in the values of that release"},
	{key: "addonmanager.kubernetes.io/mode", value: "Reconcile", who: "the addon manager", where: "in its folder on the control plane's nodes"},
	{key: "eks.amazonaws.com/component", who: "an add-on of Amazon EKS", where: "in the add-on's configuration values"},
	{key: "app.kubernetes.io/managed-by", who: "another tool", where: "where that has it from"},
	{key: "kubectl.kubernetes.io/last-applied-configuration", who: "somebody with `kubectl apply`", where: "in the file that they apply"},
}

// owner is who keeps what an object has under a key of its data, and would put back
// what somebody else writes, and where it is to be changed then; "" for nobody.
func owner(o *metav1.ObjectMeta, key string) (who, where string) {
	for _, r := range o.OwnerReferences {
		return fmt.Sprintf("%s %s, which owns it (ownerReferences)", r.Kind, r.Name), "there"
	}
	for _, m := range marks {
		for _, of := range []struct {
			kind string
			all  map[string]string
		}{{"label", o.Labels}, {"annotation", o.Annotations}} {
			value, there := of.all[m.key]
			if !there || m.value != "" && value != m.value {
				continue
			}
			if len(value) > longestMark {
				value = "..."
			}
			return fmt.Sprintf("%s (%s %s: %s)", m.who, of.kind, m.key, value), m.where
		}
	}
	for _, f := range o.ManagedFields {
		if f.Operation == metav1.ManagedFieldsOperationApply && f.Manager != fieldManager && has(f.FieldsV1, key) {
			return f.Manager + ", which applies it (managedFields)", "where that has it from"
		}
	}
	return "", ""
}

// longestMark is how much of a label or annotation is told: more is a whole object.
const longestMark = 100

// has says that a set of fields has a key of the data, or all of them
// (https://kubernetes.io/docs/reference/using-api/server-side-apply/).
func has(fields *metav1.FieldsV1, key string) bool {
	var set struct {
		Data map[string]json.RawMessage `json:"f:data"`
	}
	if fields == nil || json.Unmarshal(fields.GetRawBytes(), &set) != nil {
		return false
	}
	_, one := set.Data["f:"+key]
	return one
}
